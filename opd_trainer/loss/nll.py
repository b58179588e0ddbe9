"""Negative log-likelihood: the loss of supervised fine-tuning.

T = tokens.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from opd_trainer.types import TokenBatch
from opd_trainer.updates import Live, Wants


@dataclass(frozen=True, slots=True)
class NegativeLogLikelihood:
    """-log p(y_t), a `TokenLoss`."""

    wants: Wants = field(default_factory=Wants)

    def __call__(self, live: Live, batch: TokenBatch) -> Float[Tensor, " T"]:
        """Loss per token, 0 where masked."""
        return -torch.where(batch.mask, live.log_probs, 0.0)
