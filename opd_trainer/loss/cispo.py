"""CISPO: the clipped ratio is a weight of the score function, so that no token loses its gradient.

T = tokens. MiniMax-M1, arXiv 2506.13585, eq. 4-5.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from opd_trainer.loss.policy import PolicyLoss, ratio
from opd_trainer.types import TokenBatch


@dataclass(slots=True)
class CispoLoss(PolicyLoss):
    """-sg(clip(q, 1 - eps_low, 1 + eps_high)) A s."""

    eps_low: float = 1.0
    """How far the weight may fall below 1; 1 means no lower bound, as in the paper."""
    eps_high: float = 4.0
    """How far the weight may rise above 1 (ScaleRL, arXiv 2510.13786, uses an upper bound of 4 to 8)."""

    def __call__(
        self,
        log_probs: Float[Tensor, " T"],
        old: Float[Tensor, " T"],
        advantage: Float[Tensor, " T"],
        batch: TokenBatch,
    ) -> Float[Tensor, " T"]:
        """See the class."""
        weight = ratio(log_probs.detach(), old).clamp(1.0 - self.eps_low, 1.0 + self.eps_high)
        return -weight * advantage * log_probs

    def clipped(
        self,
        log_probs: Float[Tensor, " T"],
        old: Float[Tensor, " T"],
        advantage: Float[Tensor, " T"],
        batch: TokenBatch,
    ) -> Bool[Tensor, " T"]:
        """Where the weight was clipped (the gradient is not cut)."""
        q = ratio(log_probs, old)
        return (q < 1.0 - self.eps_low) | (q > 1.0 + self.eps_high)
