"""GSPO: group-relative advantages with the ratio of whole sequences."""

from dataclasses import dataclass, field
from typing import ClassVar

from opd_trainer.estimator.grpo import Grpo
from opd_trainer.loss.aggregation import Aggregation
from opd_trainer.loss.gspo import GspoLoss
from opd_trainer.loss.policy import PolicyLoss


@dataclass(slots=True)
class Gspo(Grpo):
    """GRPO's advantage, the clipped ratio of sequences and a mean over sequences."""

    source: ClassVar[str] = "arXiv 2507.18071, eq. 5-7, 13-14"

    loss: PolicyLoss = field(default_factory=GspoLoss)
    """The policy loss."""
    aggregation: Aggregation = Aggregation.sequence_mean
    """token_mean, sequence_mean or constant."""
