"""What every policy loss is: a strategy from the ratio of live to old policy and an advantage to a loss per token.

T = tokens. Inputs are finite everywhere (0 where masked): `opd_trainer.objective` replaces masked entries beforehand,
in one place, and zeroes the masked losses afterwards.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_trainer.types import TokenBatch


@dataclass(slots=True)
class PolicyLoss:
    """Base of all policy losses; its fields are its hyper-parameters."""

    def __call__(
        self,
        log_probs: Float[Tensor, " T"],
        old: Float[Tensor, " T"],
        advantage: Float[Tensor, " T"],
        batch: TokenBatch,
    ) -> Float[Tensor, " T"]:
        """Loss per token; gradients flow through `log_probs` only."""
        raise NotImplementedError

    def clipped(
        self,
        log_probs: Float[Tensor, " T"],
        old: Float[Tensor, " T"],
        advantage: Float[Tensor, " T"],
        batch: TokenBatch,
    ) -> Bool[Tensor, " T"]:
        """Tokens whose ratio the loss has clipped."""
        raise NotImplementedError


def ratio(log_probs: Float[Tensor, " T"], old: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """q_t = exp(s_t - o_t)."""
    return torch.exp(log_probs - old)
