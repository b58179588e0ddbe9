"""Loss weights: which share each token has in the loss of one optimizer step.

T = tokens, N = sequences. The loss of a step is sum_t weight[t] * loss[t], so the weights hold every denominator and
packing, micro-batching and data parallelism cannot change the loss.
"""

from enum import StrEnum, auto

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from opd_trainer import jagged


class Aggregation(StrEnum):
    """How token losses become one number."""

    token_mean = auto()
    """Mean over all unmasked tokens of the optimizer step (DAPO, arXiv 2503.14476, section 3.3)."""
    sequence_mean = auto()
    """Mean over sequences of each one's token mean (GRPO, arXiv 2402.03300, eq. 3)."""
    constant = auto()
    """Sum over tokens / (sequences * a constant length): no length bias (Dr. GRPO, arXiv 2503.20783, section 3.2)."""


def loss_weights(
    aggregation: Aggregation,
    seq: Int64[Tensor, " T"],
    mask: Bool[Tensor, " T"],
    num_sequences: int,
    constant_tokens: int,
) -> Float[Tensor, " T"]:
    """The weight of every token, f32, 0 where masked.

    Sequences without an unmasked token do not count in the denominator of `sequence_mean`; they do in `constant`, whose
    denominator must not depend on lengths. When every token is masked all weights are 0.

    Args:
        aggregation: which mean.
        seq: the sequence of each token.
        mask: True on tokens that count.
        num_sequences: N.
        constant_tokens: the length that `constant` divides by, tokens.
    """
    match aggregation:
        case Aggregation.token_mean:
            share = torch.full((len(seq),), 1.0 / max(int(mask.sum()), 1))
        case Aggregation.sequence_mean:
            count = jagged.count_by(seq, mask, num_sequences)
            share = (1.0 / (count.clamp_min(1) * (count > 0).sum().clamp_min(1)).float())[seq]
        case Aggregation.constant:
            share = torch.full((len(seq),), 1.0 / max(num_sequences * constant_tokens, 1))
    return torch.where(mask, share, 0.0)
