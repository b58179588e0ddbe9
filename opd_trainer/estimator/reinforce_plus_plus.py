"""REINFORCE++: discounted token rewards, whitened over the whole batch.

T = tokens. arXiv 2501.03262, section 3.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from opd_trainer.estimator.base import Advantages, Estimator
from opd_trainer.estimator.discount import at_last_token, discounted_sums
from opd_trainer.estimator.groups import broadcast, relative_to_group
from opd_trainer.loss.clip import ClipLoss
from opd_trainer.loss.policy import PolicyLoss
from opd_trainer.types import TokenBatch


@dataclass(slots=True)
class ReinforcePlusPlus(Estimator):
    """sum_{i>=t} gamma^(i-t) r_i with R at the last token and, as other token rewards, `reference.apply=reward`."""

    source: ClassVar[str] = "arXiv 2501.03262, section 3"
    needs: ClassVar[frozenset[str]] = frozenset({"reward"})
    has_returns: ClassVar[bool] = True

    loss: PolicyLoss = field(default_factory=ClipLoss)
    """The policy loss."""
    whiten: bool = True
    """Bring the advantages of the whole batch to mean 0 and variance 1 before the OPD term is added."""
    gamma: float = 1.0
    """Discount per token, 0..1."""

    def __call__(self, batch: TokenBatch, token_rewards: Float[Tensor, " T"]) -> Advantages:
        """See the class."""
        returns = discounted_sums(token_rewards + at_last_token(batch.reward, batch), batch, self.gamma)
        return Advantages(returns, returns)


@dataclass(slots=True)
class ReinforcePlusPlusBaseline(Estimator):
    """R - mean of the group, plus the token's own reward (undiscounted)."""

    source: ClassVar[str] = "arXiv 2501.03262, section 3 (with baseline)"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})

    loss: PolicyLoss = field(default_factory=ClipLoss)
    """The policy loss."""
    whiten: bool = True
    """Bring the advantages of the whole batch to mean 0 and variance 1 before the OPD term is added."""

    def __call__(self, batch: TokenBatch, token_rewards: Float[Tensor, " T"]) -> Advantages:
        """See the class."""
        centred = relative_to_group(batch.reward, batch.group, normalize_std=False)
        return Advantages(broadcast(centred, batch) + torch.where(batch.mask, token_rewards, 0.0))
