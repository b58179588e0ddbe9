"""Discounted sums over the unmasked tokens of each sequence, from the last to the first.

T = tokens, N = sequences, L = most unmasked tokens of a sequence. Masked tokens inside a response (tool output) take no
time step: the successor of a token is the next unmasked one.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from opd_trainer import jagged
from opd_trainer.types import TokenBatch


def discounted_sums(values: Float[Tensor, " T"], batch: TokenBatch, decay: float) -> Float[Tensor, " T"]:
    """y_t = x_t + decay * y_{t+1}, 0 where masked."""
    rank, length = _steps(batch)
    table = torch.zeros(batch.num_sequences, length + 1, dtype=values.dtype)
    rows, columns = batch.seq[batch.mask], rank[batch.mask]
    table[rows, columns] = values[batch.mask]
    for step in reversed(range(length)):
        table[:, step] += decay * table[:, step + 1]
    result = torch.zeros_like(values)
    result[batch.mask] = table[rows, columns]
    return result


def successors(values: Float[Tensor, " T"], batch: TokenBatch) -> Float[Tensor, " T"]:
    """The value of the next unmasked token of the same sequence, 0 at the last one and where masked."""
    rank, length = _steps(batch)
    table = torch.zeros(batch.num_sequences, length + 1, dtype=values.dtype)
    rows, columns = batch.seq[batch.mask], rank[batch.mask]
    table[rows, columns] = values[batch.mask]
    result = torch.zeros_like(values)
    result[batch.mask] = table[rows, columns + 1]
    return result


def at_last_token(reward: Float[Tensor, " N"], batch: TokenBatch) -> Float[Tensor, " T"]:
    """A sequence's reward on its last unmasked token, 0 elsewhere."""
    return torch.where(jagged.last_of(batch.seq, batch.mask, batch.num_sequences), reward[batch.seq], 0.0)


def _steps(batch: TokenBatch) -> tuple[Tensor, int]:
    """The time step of each unmasked token, and L."""
    rank = jagged.rank_of(batch.seq, batch.mask, batch.num_sequences)
    chosen = rank[batch.mask]
    return rank, int(chosen.max()) + 1 if len(chosen) else 0
