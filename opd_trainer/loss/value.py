"""The critic's loss and how well it predicts.

T = tokens. PPO's clipped value loss, as in the reference implementation of arXiv 1707.06347.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(slots=True)
class ValueLoss:
    """max((v - R)^2, (v_old + clip(v - v_old, -c, c) - R)^2) / 2."""

    clip: float = 0.2
    """c: how far a value may move from the old one before its loss is clipped, in units of the return."""

    def __call__(
        self,
        values: Float[Tensor, " T"],
        old: Float[Tensor, " T"],
        returns: Float[Tensor, " T"],
        mask: Bool[Tensor, " T"],
    ) -> Float[Tensor, " T"]:
        """Loss per token, 0 where masked; masked entries may hold NaN.

        Args:
            values: live values, with gradient.
            old: values before the first update on this rollout.
            returns: targets.
            mask: tokens that count.
        """
        free, clipped = self._errors(values, old, returns, mask)
        return torch.maximum(free, clipped) / 2

    def clipped(
        self,
        values: Float[Tensor, " T"],
        old: Float[Tensor, " T"],
        returns: Float[Tensor, " T"],
        mask: Bool[Tensor, " T"],
    ) -> Bool[Tensor, " T"]:
        """Unmasked tokens whose loss is the clipped one, which has no gradient."""
        free, clipped = self._errors(values, old, returns, mask)
        return clipped > free

    def _errors(
        self,
        values: Float[Tensor, " T"],
        old: Float[Tensor, " T"],
        returns: Float[Tensor, " T"],
        mask: Bool[Tensor, " T"],
    ) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
        """Squared errors of the live and of the clipped values, both 0 where masked."""
        live, frozen, target = (torch.where(mask, x, 0.0) for x in (values, old, returns))
        near = frozen + (live - frozen).clamp(-self.clip, self.clip)
        return (live - target).square(), (near - target).square()


def explained_variance(values: Float[Tensor, " T"], returns: Float[Tensor, " T"], mask: Bool[Tensor, " T"]) -> float:
    """1 - Var(returns - values) / Var(returns) over unmasked tokens; NaN where the returns do not vary."""
    if int(mask.sum()) < 2:
        return float("nan")
    chosen = returns[mask].double()
    spread = float(chosen.var(correction=0))
    residual = float((chosen - values[mask].double()).var(correction=0))
    return 1.0 - residual / spread if spread else float("nan")
