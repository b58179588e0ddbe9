"""GRPO: advantages relative to the siblings of a response.

T = tokens. arXiv 2402.03300, section 4.1.2. Deviations: (1) token_mean aggregation and no KL by default, as in DAPO
(arXiv 2503.14476); (2) 1e-6 is added to the standard deviation. Dr. GRPO (arXiv 2503.20783) is this estimator with
`normalize_std: false` and `aggregation: constant`.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from opd_trainer.estimator.base import Advantages, Estimator
from opd_trainer.estimator.groups import broadcast, relative_to_group, sequence_return
from opd_trainer.loss.clip import ClipLoss
from opd_trainer.loss.policy import PolicyLoss
from opd_trainer.types import TokenBatch


@dataclass(slots=True)
class Grpo(Estimator):
    """(R - mean) / (std + 1e-6) over the group, the same for every token of the response."""

    source: ClassVar[str] = "arXiv 2402.03300, section 4.1.2"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})

    loss: PolicyLoss = field(default_factory=ClipLoss)
    """The policy loss."""
    normalize_std: bool = True
    """Divide by the group's standard deviation."""

    def __call__(self, batch: TokenBatch, token_rewards: Float[Tensor, " T"]) -> Advantages:
        """See the class."""
        relative = relative_to_group(sequence_return(batch, token_rewards), batch.group, self.normalize_std)
        return Advantages(broadcast(relative, batch))
