"""CISPO: group-relative advantages with clipped importance weights."""

from dataclasses import dataclass, field
from typing import ClassVar

from opd_trainer.estimator.grpo import Grpo
from opd_trainer.loss.cispo import CispoLoss
from opd_trainer.loss.policy import PolicyLoss


@dataclass(slots=True)
class Cispo(Grpo):
    """GRPO's advantage times the score function, weighted with the clipped ratio."""

    source: ClassVar[str] = "arXiv 2506.13585, eq. 4-5"

    loss: PolicyLoss = field(default_factory=CispoLoss)
    """The policy loss."""
