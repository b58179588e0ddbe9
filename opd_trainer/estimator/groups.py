"""Statistics over groups of siblings, i.e. responses to one prompt.

N = sequences, T = tokens. Computed in float64: the mean of equal float32 rewards is then exact, and no rounding noise
is blown up by a division by a standard deviation of 0 + 1e-6.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opd_trainer import jagged
from opd_trainer.types import TokenBatch

STD_EPSILON = 1e-6


def sequence_return(batch: TokenBatch, token_rewards: Float[Tensor, " T"]) -> Float[Tensor, " N"]:
    """Task reward plus the rewards of the sequence's unmasked tokens."""
    return batch.reward + jagged.sum_by(token_rewards, batch.seq, batch.mask, batch.num_sequences)


def _sums(values: Float[Tensor, " N"], group: Int64[Tensor, " N"]) -> tuple[Tensor, Tensor]:
    """Each sequence's group sum and group size, both f64[N]."""
    _, member = torch.unique(group, return_inverse=True)
    size = torch.bincount(member)
    total = torch.zeros(len(size), dtype=torch.float64).index_add(0, member, values.double())
    return total[member], size[member].double()


def relative_to_group(
    reward: Float[Tensor, " N"], group: Int64[Tensor, " N"], normalize_std: bool
) -> Float[Tensor, " N"]:
    """(R - mean) / (std + 1e-6) within each group, std unbiased; only R - mean without `normalize_std`.

    A group of one has no deviation from its mean: its result is 0.
    """
    total, size = _sums(reward, group)
    centred = reward.double() - total / size
    if not normalize_std:
        return centred.to(reward.dtype)
    squares, _ = _sums(centred.square(), group)
    std = torch.sqrt(squares / (size - 1).clamp_min(1))
    return (centred / (std + STD_EPSILON)).to(reward.dtype)


def leave_one_out(reward: Float[Tensor, " N"], group: Int64[Tensor, " N"]) -> Float[Tensor, " N"]:
    """R - mean of the other members of the group; 0 in a group of one."""
    total, size = _sums(reward, group)
    value = reward.double()
    others = (total - value) / (size - 1).clamp_min(1)
    return torch.where(size > 1, value - others, 0.0).to(reward.dtype)


def broadcast(values: Float[Tensor, " N"], batch: TokenBatch) -> Float[Tensor, " T"]:
    """A sequence's value on each of its unmasked tokens, 0 where masked."""
    return torch.where(batch.mask, values[batch.seq], 0.0)
