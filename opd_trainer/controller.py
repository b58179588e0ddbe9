"""The loop. On-policy distillation: the student samples, the teacher judges every token, the student follows."""

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from opd_trainer.checkpoint import Checkpoints, Stateful
from opd_trainer.experience import Experience
from opd_trainer.metrics import Metrics
from opd_trainer.protocols import Learner, RolloutEngine, TokenLoss
from opd_trainer.tracking.tracker import StepLog, Tracker
from opd_trainer.types import TokenBatch
from opd_trainer.updates import UpdateResult


class TrainingObjective(Stateful, Protocol):
    """What the loop asks of an objective; see `opd_trainer.objective.Objective`."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of a batch that must be scored before `assign`."""
        ...

    def assign(self, batch: TokenBatch) -> TokenBatch:
        """The batch with advantages and loss weights; begins a step."""
        ...

    def minibatches(self, batch: TokenBatch) -> Sequence[TokenBatch]:
        """The batches of the optimizer steps on one rollout batch."""
        ...

    def loss(self) -> TokenLoss:
        """The loss of this step's updates."""
        ...

    def metrics(self, batch: TokenBatch, result: UpdateResult) -> Metrics:
        """The metrics of one update."""
        ...


class Evaluate(Protocol):
    """What the loop asks of an evaluator."""

    def __call__(self, step: int, *, last: bool) -> Awaitable[Metrics]:
        """Metrics of the weights after `step` updates; empty when nothing is due."""
        ...


@dataclass(slots=True)
class Controller:
    """Everything a run consists of; `fit` is the algorithm."""

    experience: Experience
    objective: TrainingObjective
    learner: Learner
    engine: RolloutEngine
    evaluate: Evaluate
    tracker: Tracker
    checkpoint: Checkpoints

    async def fit(self) -> None:
        """Runs the steps that are left."""
        for step in self.checkpoint.steps():
            with self.tracker.step(step) as log:
                batch = await self.experience.next(step, log)
                async with self.engine.asleep(), self.learner.awake():
                    if batch is not None:
                        with log.time("update"):
                            await self.learn(batch, log)
                    with log.time("sync"):
                        await self.engine.load(self.learner.weights(version=step + 1))
                log.add(await self.evaluate(step + 1, last=self.checkpoint.is_last(step)))
            await self.checkpoint.save(step, self)

    async def learn(self, batch: TokenBatch, log: StepLog) -> None:
        """The optimizer steps on one batch."""
        batch = self.objective.assign(await self.score_missing(batch))
        for minibatch in self.objective.minibatches(batch):
            result = await self.learner.update(minibatch, self.objective.loss())
            log.updated(result)
            log.add(self.objective.metrics(minibatch, result))

    async def score_missing(self, batch: TokenBatch) -> TokenBatch:
        """Forward-only passes over what the objective needs and the batch does not have yet."""
        for name in sorted(self.objective.needs):
            if getattr(batch, name) is None:
                batch = batch.scored(name, await self.learner.score(batch, name))
        return batch
