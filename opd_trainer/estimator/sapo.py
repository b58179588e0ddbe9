"""SAPO: group-relative advantages behind a smooth gate."""

from dataclasses import dataclass, field
from typing import ClassVar

from opd_trainer.estimator.grpo import Grpo
from opd_trainer.loss.aggregation import Aggregation
from opd_trainer.loss.policy import PolicyLoss
from opd_trainer.loss.sapo import SapoLoss


@dataclass(slots=True)
class Sapo(Grpo):
    """GRPO's advantage, a sigmoid gate in place of the clip and a mean over sequences."""

    source: ClassVar[str] = "arXiv 2511.20347"

    loss: PolicyLoss = field(default_factory=SapoLoss)
    """The policy loss."""
    aggregation: Aggregation = Aggregation.sequence_mean
    """token_mean, sequence_mean or constant."""
