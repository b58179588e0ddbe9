"""RLOO: REINFORCE with the mean of the other siblings as baseline.

T = tokens. arXiv 2402.14740, section 2.2.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from opd_trainer.estimator.base import Advantages, Estimator
from opd_trainer.estimator.groups import broadcast, leave_one_out, sequence_return
from opd_trainer.loss.clip import ClipLoss
from opd_trainer.loss.policy import PolicyLoss
from opd_trainer.types import TokenBatch


@dataclass(slots=True)
class Rloo(Estimator):
    """R - mean of the other n - 1 siblings, the same for every token of the response."""

    source: ClassVar[str] = "arXiv 2402.14740, section 2.2"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})

    loss: PolicyLoss = field(default_factory=ClipLoss)
    """The policy loss."""

    def __call__(self, batch: TokenBatch, token_rewards: Float[Tensor, " T"]) -> Advantages:
        """See the class."""
        relative = leave_one_out(sequence_return(batch, token_rewards), batch.group)
        return Advantages(broadcast(relative, batch))
