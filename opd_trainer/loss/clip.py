"""The clipped surrogate of PPO with asymmetric bounds and an optional dual clip.

T = tokens. PPO: arXiv 1707.06347, eq. 7. Asymmetric bounds ("clip-higher"): DAPO, arXiv 2503.14476, section 3.1.
Dual clip: arXiv 1912.09729.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_trainer.loss.policy import PolicyLoss, ratio
from opd_trainer.types import TokenBatch


def clipped_surrogate(
    q: Float[Tensor, " T"], advantage: Float[Tensor, " T"], eps_low: float, eps_high: float
) -> Float[Tensor, " T"]:
    """max(-q A, -clip(q, 1 - eps_low, 1 + eps_high) A)."""
    return torch.maximum(-q * advantage, -q.clamp(1.0 - eps_low, 1.0 + eps_high) * advantage)


def outside_trust_region(
    q: Float[Tensor, " T"], advantage: Float[Tensor, " T"], eps_low: float, eps_high: float
) -> Bool[Tensor, " T"]:
    """Where the clipped branch is the larger one: the ratio has moved too far in the direction of the advantage."""
    return ((q > 1.0 + eps_high) & (advantage > 0)) | ((q < 1.0 - eps_low) & (advantage < 0))


@dataclass(slots=True)
class ClipLoss(PolicyLoss):
    """max(-q A, -clip(q, 1 - eps_low, 1 + eps_high) A), with q = exp(s - o)."""

    eps_low: float = 0.2
    """How far the ratio may fall below 1 where the advantage is negative, 0..1."""
    eps_high: float = 0.2
    """How far the ratio may rise above 1 where the advantage is positive (DAPO: 0.28)."""
    dual_clip: float | None = None
    """Upper bound c > 1 of the loss, in units of -A, where the advantage is negative; null switches it off."""

    def __call__(
        self,
        log_probs: Float[Tensor, " T"],
        old: Float[Tensor, " T"],
        advantage: Float[Tensor, " T"],
        batch: TokenBatch,
    ) -> Float[Tensor, " T"]:
        """See the class."""
        loss = clipped_surrogate(ratio(log_probs, old), advantage, self.eps_low, self.eps_high)
        if self.dual_clip is None:
            return loss
        return torch.where(advantage < 0, torch.minimum(loss, -self.dual_clip * advantage), loss)

    def clipped(
        self,
        log_probs: Float[Tensor, " T"],
        old: Float[Tensor, " T"],
        advantage: Float[Tensor, " T"],
        batch: TokenBatch,
    ) -> Bool[Tensor, " T"]:
        """Where the gradient is cut, by the band or by the dual clip."""
        q = ratio(log_probs, old)
        outside = outside_trust_region(q, advantage, self.eps_low, self.eps_high)
        return outside if self.dual_clip is None else outside | ((advantage < 0) & (q > self.dual_clip))
