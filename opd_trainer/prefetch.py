"""One-step-off rollouts: while the student learns from one step's samples, those of the next step are generated.

Step k >= 1 learns from samples of version k - 1 of the weights (step 0 from version 0), so that a sample is at most one
version old. The loop is the same; what differs is what `next` hands out, and that nobody may touch the engine before
the samples under way are complete.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from opd_trainer.errors import OpdError
from opd_trainer.experience import Drawn, OnPolicyExperience
from opd_trainer.metrics import Metrics, Stat
from opd_trainer.protocols import RolloutEngine
from opd_trainer.sample_state import pack, unpack
from opd_trainer.tracking.tracker import StepLog
from opd_trainer.types import Request, Sample, Sampling, TokenBatch, WeightStream

MAX_STALENESS = 1
"""Versions that a sample may lag behind the policy that learns from it."""


@dataclass(slots=True)
class OneStepOffExperience:
    """Hands out the samples that were generated during the step before, and begins those of the next.

    Attributes:
        source: generates and judges the samples of one step.
        total_steps: of the run; nothing is generated for a step beyond the last.
        waiting: times what passes inside as rollout.
    """

    source: OnPolicyExperience
    total_steps: int
    waiting: Callable[[], AbstractContextManager[Any]]
    _ahead: asyncio.Task[Drawn] | None = field(default=None, init=False)
    _ready: Drawn | None = field(default=None, init=False)

    async def next(self, step: int, log: StepLog) -> TokenBatch | None:
        """See `OnPolicyExperience.next`.

        Raises:
            OpdError: a sample is older than one version.
        """
        await self.settle()
        with self.waiting():
            drawn = self._ready or await self.source.draw(step)
        self._ready = None
        oldest = min((sample.version for sample in drawn.samples), default=step)
        if step - oldest > MAX_STALENESS:
            raise OpdError(f"step {step} got samples of version {oldest}: more than {MAX_STALENESS} behind")
        if step + 1 < self.total_steps:
            self._ahead = asyncio.create_task(self.source.draw(step + 1))
        return self.source.batch(drawn, step, log)

    async def settle(self) -> None:
        """Waits until the samples under way, if there are any, are complete."""
        if self._ahead is not None:
            with self.waiting():
                self._ready = await self._ahead
            self._ahead = None

    async def close(self) -> None:
        """Gives up what is under way. Safe to call twice."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.cancel()
            # The run ends for another reason, which is not to be hidden.
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await ahead

    def state_dict(self) -> dict[str, Any]:
        """The cursor into the prompts, behind those of the samples that are ready, and these samples.

        Their weights are gone when a run resumes, so that they cannot be generated again.
        """
        assert self._ahead is None, "the engine took new weights before this"
        ready = None if self._ready is None else _state_of(self._ready)
        return {**self.source.state_dict(), "ready": ready}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.source.load_state_dict(state)
        self._ready = None if state["ready"] is None else _drawn_of(state["ready"])


@dataclass(slots=True)
class SettledEngine:
    """The engine of a one-step-off run for everybody else: new weights and evaluations wait for the samples under way.

    Attributes:
        engine: the one that the samples under way are from.
        experience: knows when they are complete.
    """

    engine: RolloutEngine
    experience: OneStepOffExperience

    async def start(self) -> None:
        """See `RolloutEngine`."""
        await self.engine.start()

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> AsyncGenerator[Sample, None]:
        """See `RolloutEngine`."""
        await self.experience.settle()
        async for sample in self.engine.generate(requests, sampling):
            yield sample

    async def load(self, weights: WeightStream) -> None:
        """See `RolloutEngine`."""
        await self.experience.settle()
        await self.engine.load(weights)

    def asleep(self) -> AbstractAsyncContextManager[None]:
        """It generates while the student learns, and never sleeps."""
        return contextlib.nullcontext()

    def metrics(self) -> Metrics:
        """See `RolloutEngine`."""
        return self.engine.metrics()

    async def close(self) -> None:
        """See `RolloutEngine`."""
        await self.engine.close()


def _state_of(drawn: Drawn) -> dict[str, Any]:
    number = {id(sample): place for place, sample in enumerate(drawn.samples)}
    return {
        "asked": drawn.asked,
        "samples": pack(drawn.samples),
        "kept": [[number[id(sample)] for sample in group] for group in drawn.kept],
        "left_out": drawn.left_out,
        "dropped": drawn.dropped,
        "told": {name: [stat.total, stat.count] for name, stat in drawn.told.stats.items()},
    }


def _drawn_of(state: dict[str, Any]) -> Drawn:
    samples = unpack(state["samples"])
    return Drawn(
        asked=state["asked"],
        samples=samples,
        kept=[[samples[place] for place in group] for group in state["kept"]],
        left_out=state["left_out"],
        dropped=state["dropped"],
        told=Metrics({name: Stat(*values) for name, values in state["told"].items()}),
    )
