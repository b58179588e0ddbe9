"""Negative log-likelihood: the loss of supervised fine-tuning.

T = tokens.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opd_trainer.types import TokenBatch


@dataclass(frozen=True, slots=True)
class NegativeLogLikelihood:
    """-log p(y_t), a `TokenLoss`."""

    needs_entropy_gradient: bool = False

    def __call__(
        self, log_probs: Float[Tensor, " T"], entropy: Float[Tensor, " T"], batch: TokenBatch
    ) -> Float[Tensor, " T"]:
        """Loss per token, 0 where masked."""
        return -torch.where(batch.mask, log_probs, 0.0)
