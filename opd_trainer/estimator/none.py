"""No task advantage: pure distillation.

T = tokens.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from opd_trainer.estimator.base import Advantages, Estimator
from opd_trainer.loss.clip import ClipLoss
from opd_trainer.loss.policy import PolicyLoss
from opd_trainer.types import TokenBatch


@dataclass(slots=True)
class NoEstimator(Estimator):
    """Advantage 0: only the OPD term and the reference KL train the student."""

    source: ClassVar[str] = "pure distillation; the OPD term is the whole advantage"

    loss: PolicyLoss = field(default_factory=ClipLoss)
    """The policy loss that carries the OPD term."""

    def __call__(self, batch: TokenBatch, token_rewards: Float[Tensor, " T"]) -> Advantages:
        """Zero."""
        return Advantages(torch.zeros_like(token_rewards))
