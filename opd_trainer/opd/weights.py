"""Token weights of the OPD term: which part of a response the student should listen to the teacher in.

T = tokens.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_trainer import jagged
from opd_trainer.opd.config import TokenWeights, WeightsConfig
from opd_trainer.types import TokenBatch


def token_weights(
    options: WeightsConfig, reverse_kl: Float[Tensor, " T"], valid: Bool[Tensor, " T"], batch: TokenBatch
) -> Float[Tensor, " T"]:
    """Factor on each token's term, before masking. Needs whole sequences in the batch.

    Args:
        options: which weights.
        reverse_kl: [T] the term, 0 where not valid.
        valid: [T] tokens with a term.
        batch: the tokens.
    """
    match options.kind:
        case TokenWeights.uniform:
            return torch.ones_like(reverse_kl)
        case TokenWeights.first_fraction:
            return _first_fraction(options.fraction, batch).to(reverse_kl.dtype)
        case TokenWeights.importance:
            return _importance(options.gamma, reverse_kl.abs(), valid, batch)


def _first_fraction(fraction: float, batch: TokenBatch) -> Bool[Tensor, " T"]:
    """True on the first ceil(fraction * R) of a response's R unmasked tokens."""
    count = jagged.count_by(batch.seq, batch.mask, batch.num_sequences)
    kept = torch.ceil(fraction * count.double())
    return jagged.rank_of(batch.seq, batch.mask, batch.num_sequences) < kept[batch.seq]


def _importance(
    gamma: float, size: Float[Tensor, " T"], valid: Bool[Tensor, " T"], batch: TokenBatch
) -> Float[Tensor, " T"]:
    """1 + gamma (1 - sum_{i<t} a_i / sum_i a_i) (IW-OPD, arXiv 2606.22600); 1 + gamma where a sequence's sum is 0."""
    before = jagged.sum_before(size, batch.seq, valid, batch.num_sequences)
    total = jagged.sum_by(size, batch.seq, valid, batch.num_sequences)[batch.seq]
    return 1.0 + gamma * (1.0 - torch.where(total > 0, before / torch.where(total > 0, total, 1.0), 0.0))
