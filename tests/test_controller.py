"""What the loop scores before the objective sees a batch."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from opd_trainer.controller import Controller
from opd_trainer.estimator.ppo import Ppo
from opd_trainer.loss.config import LossConfig, ReferenceConfig
from opd_trainer.opd.config import OpdConfig, OpdType
from opd_trainer.types import TokenBatch
from tests.laws.options import batch_of, objective


@dataclass
class Recorder:
    """A learner that scores everything with the number of the call."""

    asked: list[str] = field(default_factory=list)

    async def score(self, batch: TokenBatch, model: str) -> torch.Tensor:
        self.asked.append(model)
        return torch.full((batch.num_tokens,), float(len(self.asked)))


def test_only_what_is_missing_is_scored() -> None:
    learner, nothing = Recorder(), cast(Any, None)
    chosen = objective(
        Ppo(),
        opd=OpdConfig(type=OpdType.off),
        reference=ReferenceConfig(kl_coef=0.1),
        options=LossConfig(updates_per_rollout=2),
    )
    controller = Controller(nothing, chosen, cast(Any, learner), nothing, nothing, nothing, nothing)
    batch = batch_of([[1, 1], [1]], values=None, old=None)
    scored = asyncio.run(controller.score_missing(batch))
    assert learner.asked == ["old", "values"]
    assert scored.old is not None
    assert scored.values is not None
    assert scored.old.log_probs.tolist() == [1.0] * batch.num_tokens
    assert scored.values.tolist() == [2.0] * batch.num_tokens
    assert scored.reference is batch.reference
