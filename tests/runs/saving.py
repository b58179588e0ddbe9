"""Training with a checkpoint after every step, in a process that can be killed in the middle of a save."""

import asyncio
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_trainer.build.learner import MakeMegatronWorker
from opd_trainer.checkpoint import Checkpoints
from opd_trainer.cluster.inprocess import InProcessGroup
from opd_trainer.megatron.learner import MegatronLearner
from tests.megatron import training

STEPS = 4
KILLED_SAVE = 3
OPERATIONS = ("open", "os.", "shutil.")
"""Beginnings of the audit events of Python's file operations."""


@dataclass
class Counter:
    """State of a run that is not the learner's."""

    value: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@dataclass
class Run:
    """What a checkpoint holds."""

    learner: MegatronLearner
    experience: Counter = field(default_factory=Counter)
    objective: Counter = field(default_factory=Counter)
    tracker: Counter = field(default_factory=Counter)


@dataclass
class Watch:
    """An audit hook: lists the file operations below a folder, and kills the process before one of them."""

    folder: Path
    point: int | None = None
    on: bool = False
    operations: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or not event.startswith(OPERATIONS) or not arguments:
            return
        path = str(arguments[0])
        if not path.startswith(str(self.folder)):
            return
        self.operations.append(f"{event} {Path(path).relative_to(self.folder)}")
        if len(self.operations) == self.point:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Trained:
    """What a process has done.

    Attributes:
        resumed_from: finished steps at its start.
        numbers: loss and gradient norm of each of its steps.
    """

    resumed_from: int
    numbers: list[tuple[float, float]]


async def train(student: Path, folder: Path, watch: Watch | None = None, *, background: bool = False) -> Trained:
    """Trains from the newest checkpoint in `folder` to the end; in the background also the later saves are watched."""
    group = InProcessGroup(MakeMegatronWorker(training.spec(student, total_steps=STEPS, lr=1e-2)))
    learner = MegatronLearner(group, max_tokens=4096, bucket_bytes=1 << 20)
    await learner.start()
    try:
        run, checkpoints = Run(learner), Checkpoints(folder, every=1, keep=1, total_steps=STEPS, background=background)
        trained = Trained(await checkpoints.restore(run), [])
        assert run.experience.value == trained.resumed_from
        for step in checkpoints.steps():
            result = await learner.update(training.batch(seed=step), training.WeightedNll())
            trained.numbers.append((result.loss, result.grad_norm))
            run.experience.value = step + 1
            if watch is not None:
                watch.on = watch.on or step + 1 == KILLED_SAVE
            await checkpoints.save(step, run)
            if watch is not None:
                watch.on = watch.on and background
        return trained
    finally:
        await learner.close()


def train_until_killed(student: Path, folder: Path, point: int, background: bool) -> None:
    """In a process of its own: kills it with SIGKILL right before file operation number `point` of its third save."""
    watch = Watch(folder, point)
    sys.addaudithook(watch)
    asyncio.run(train(student, folder, watch, background=background))
