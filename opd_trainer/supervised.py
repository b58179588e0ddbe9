"""Supervised fine-tuning as a run of the same loop: rows for rollouts, log-likelihood for advantages.

See `opd_trainer.references` for what a row is.
"""

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from opd_trainer.data.stream import PromptStream
from opd_trainer.loss.nll import NegativeLogLikelihood
from opd_trainer.metrics import Metrics
from opd_trainer.protocols import TokenLoss
from opd_trainer.references import Referee, reference_batch
from opd_trainer.tracking.tracker import StepLog
from opd_trainer.types import Request, Sample, Sampling, TokenBatch, WeightStream
from opd_trainer.updates import UpdateResult


@dataclass(slots=True)
class SupervisedExperience:
    """Rows of a dataset with the response to learn."""

    stream: PromptStream
    reference: Referee
    batch_size: int

    async def next(self, step: int, log: StepLog) -> TokenBatch:
        """The next rows, with the response and its end-of-sequence token unmasked."""
        return reference_batch([self.reference(prompt) for prompt in self.stream.next(self.batch_size)], step)

    def state_dict(self) -> dict[str, Any]:
        """The cursor into the rows."""
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.stream.load_state_dict(state["stream"])


@dataclass(slots=True)
class SupervisedObjective:
    """Mean negative log-likelihood over the unmasked tokens of a step."""

    @property
    def needs(self) -> frozenset[str]:
        """Nothing is scored beforehand."""
        return frozenset()

    def assign(self, batch: TokenBatch) -> TokenBatch:
        """Every unmasked token weighs the same."""
        weight = batch.mask.float() / batch.mask.sum()
        return batch.replace(weight=weight)

    def minibatches(self, batch: TokenBatch) -> Sequence[TokenBatch]:
        """One optimizer step a batch."""
        return [batch]

    def loss(self) -> TokenLoss:
        """-log_probs."""
        return NegativeLogLikelihood()

    def metrics(self, batch: TokenBatch, result: UpdateResult) -> Metrics:
        """Loss, entropy and optimizer figures."""
        metrics = Metrics().put("train/loss", result.loss)
        metrics.put("train/grad_norm", result.grad_norm).put("train/lr", result.learning_rate)
        return metrics.mean("train/entropy", result.entropy, batch.mask)

    def state_dict(self) -> dict[str, Any]:
        """Stateless."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stateless."""


class NoRollout:
    """The engine of a run that generates nothing: weights are never pulled."""

    async def start(self) -> None:
        """Nothing to start."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> AsyncIterator[Sample]:
        """Never asked."""
        raise AssertionError("a supervised run generates nothing")

    async def load(self, weights: WeightStream) -> None:
        """Leaves the stream untouched."""

    def asleep(self) -> AbstractAsyncContextManager[None]:
        """See `RolloutEngine`; it has no memory."""
        return contextlib.nullcontext()

    def metrics(self) -> Metrics:
        """Nothing to tell."""
        return Metrics()

    async def close(self) -> None:
        """Nothing to close."""
