"""What every advantage estimator is: a strategy from rewards to advantages, bundled with the policy loss that it uses.

T = tokens, N = sequences.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from opd_trainer.loss.aggregation import Aggregation
from opd_trainer.loss.policy import PolicyLoss
from opd_trainer.loss.value import ValueLoss
from opd_trainer.types import TokenBatch


@dataclass(frozen=True, slots=True)
class Advantages:
    """What an estimator gives.

    Attributes:
        advantage: [T], 0 where masked.
        returns: [T] discounted rewards to go, the critic's targets, 0 where masked; None where tokens have no rewards.
    """

    advantage: Float[Tensor, " T"]
    returns: Float[Tensor, " T"] | None = None


@dataclass(slots=True)
class Estimator:
    """Base of all estimators; its fields are its hyper-parameters."""

    source: ClassVar[str] = ""
    """Paper and equation."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What must be scored before it is called, among "reward", "group" (several samples per prompt), "values"."""
    has_returns: ClassVar[bool] = False
    """Whether it gives `Advantages.returns`, into which the OPD term can be put."""

    loss: PolicyLoss = field(default_factory=PolicyLoss)
    """The policy loss."""
    aggregation: Aggregation = Aggregation.token_mean
    """token_mean, sequence_mean or constant."""
    aggregation_tokens: int | None = None
    """Length that `aggregation=constant` divides by, tokens; null means the maximum response length."""
    whiten: bool = False
    """Bring the advantages of the whole batch to mean 0 and variance 1 before the OPD term is added."""

    @property
    def critic_loss(self) -> ValueLoss | None:
        """The loss of the critic whose values it needs; None where it needs none."""
        return None

    def __call__(self, batch: TokenBatch, token_rewards: Float[Tensor, " T"]) -> Advantages:
        """Advantages before whitening and before the OPD term.

        Args:
            batch: rollouts with `batch.reward` [N], the task reward at the end of each sequence.
            token_rewards: [T] rewards of single tokens (penalties), 0 where masked.
        """
        raise NotImplementedError
