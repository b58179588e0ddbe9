"""SAPO: a smooth gate in place of the clip.

T = tokens. Soft Adaptive Policy Optimization, arXiv 2511.20347.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_trainer.loss.policy import PolicyLoss, ratio
from opd_trainer.types import TokenBatch


@dataclass(slots=True)
class SapoLoss(PolicyLoss):
    """-f(q) A, f(q) = (4 / tau) sigmoid(tau (q - 1)); df/dq = 1 at q = 1."""

    tau_pos: float = 1.0
    """Steepness of the gate where the advantage is positive, > 0."""
    tau_neg: float = 1.05
    """Steepness of the gate where the advantage is not positive, > 0."""

    def __call__(
        self,
        log_probs: Float[Tensor, " T"],
        old: Float[Tensor, " T"],
        advantage: Float[Tensor, " T"],
        batch: TokenBatch,
    ) -> Float[Tensor, " T"]:
        """See the class."""
        tau = torch.where(advantage > 0, self.tau_pos, self.tau_neg).to(advantage.dtype)
        return -(4.0 / tau) * torch.sigmoid(tau * (ratio(log_probs, old) - 1.0)) * advantage

    def clipped(
        self,
        log_probs: Float[Tensor, " T"],
        old: Float[Tensor, " T"],
        advantage: Float[Tensor, " T"],
        batch: TokenBatch,
    ) -> Bool[Tensor, " T"]:
        """Nowhere: the gate fades out and never cuts."""
        return torch.zeros_like(batch.mask)
