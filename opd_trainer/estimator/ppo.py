"""PPO: generalised advantage estimation with a critic.

T = tokens. PPO: arXiv 1707.06347. GAE: arXiv 1506.02438, eq. 16.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from opd_trainer.estimator.base import Advantages, Estimator
from opd_trainer.estimator.discount import at_last_token, discounted_sums, successors
from opd_trainer.loss.clip import ClipLoss
from opd_trainer.loss.policy import PolicyLoss
from opd_trainer.loss.value import ValueLoss
from opd_trainer.types import TokenBatch


@dataclass(slots=True)
class Ppo(Estimator):
    """A_t = sum_{i>=t} (gamma lambda)^(i-t) delta_i, delta_t = r_t + gamma V_{t+1} - V_t; returns = A + V.

    V_t is the critic's value of the prefix before token t, 0 after the last one; R is the reward of the last token.
    Computed the other way round, A = G - V with G_t = r_t + gamma ((1 - lambda) V_{t+1} + lambda G_{t+1}), so that with
    lambda = 1 rounded values do not get into the returns.
    """

    source: ClassVar[str] = "arXiv 1707.06347; GAE: arXiv 1506.02438, eq. 16"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "values"})
    has_returns: ClassVar[bool] = True

    loss: PolicyLoss = field(default_factory=ClipLoss)
    """The policy loss."""
    whiten: bool = True
    """Bring the advantages of the whole batch to mean 0 and variance 1 before the OPD term is added."""
    gamma: float = 1.0
    """Discount per token, 0..1."""
    lam: float = 1.0
    """GAE's lambda, 0..1: 0 trusts the critic, 1 the rewards."""
    value_loss: ValueLoss = field(default_factory=ValueLoss)
    """The critic's loss."""

    @property
    def critic_loss(self) -> ValueLoss:
        """See `Estimator.critic_loss`."""
        return self.value_loss

    def __call__(self, batch: TokenBatch, token_rewards: Float[Tensor, " T"]) -> Advantages:
        """See the class."""
        assert batch.values is not None
        values = torch.where(batch.mask, batch.values, 0.0)
        rewards = token_rewards + at_last_token(batch.reward, batch)
        bootstrapped = self.gamma * (1 - self.lam) * successors(values, batch)
        returns = discounted_sums(rewards + bootstrapped, batch, self.gamma * self.lam)
        return Advantages(returns - values, returns)
