"""Checkpoints of a run: atomic, keep-last-n, exact on resume.

Layout of the directory, after Megatron-LM's conventions so that any of ours can be loaded as a model:

    latest_checkpointed_iteration.txt   the number of finished steps of the newest complete checkpoint
    iter_0000020/controller.json        step, data cursor, controller and tracker state
    iter_0000020/...                    what the learner writes: weights, optimizer, scheduler, RNG
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from opd_trainer.errors import CheckpointError
from opd_trainer.files import write_atomically
from opd_trainer.protocols import Learner

LATEST = "latest_checkpointed_iteration.txt"
CONTROLLER_STATE = "controller.json"


class Stateful(Protocol):
    """Something whose state is a JSON-able dictionary."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        ...


class Resumable(Protocol):
    """What a checkpoint holds."""

    @property
    def learner(self) -> Learner:
        """Writes its own files."""
        ...

    @property
    def experience(self) -> Stateful:
        """The data cursor."""
        ...

    @property
    def objective(self) -> Stateful:
        """Adaptive coefficients."""
        ...

    @property
    def tracker(self) -> Stateful:
        """First evaluation and wall times."""
        ...


def iteration_name(finished: int) -> str:
    """Directory name of the checkpoint after `finished` steps."""
    return f"iter_{finished:07d}"


@dataclass(slots=True)
class Checkpoints:
    """Saves every `every` steps and after the last one, keeps the newest `keep`.

    Attributes:
        directory: where the `iter_*` directories go.
        every: steps between checkpoints; 0 saves only after the last step.
        keep: how many to keep, at least 1.
        total_steps: steps of the whole run.
        finished: steps that are done; set by `restore`.
    """

    directory: Path
    every: int
    keep: int
    total_steps: int
    finished: int = field(default=0)

    def steps(self) -> Iterator[int]:
        """The steps that are left, counted from 0."""
        while self.finished < self.total_steps:
            yield self.finished
            self.finished += 1

    def is_last(self, step: int) -> bool:
        """Whether no step follows `step`."""
        return step + 1 >= self.total_steps

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        marker = self.directory / LATEST
        if not marker.is_file():
            return None
        path = self.directory / iteration_name(int(marker.read_text()))
        if not (path / CONTROLLER_STATE).is_file():
            raise CheckpointError(
                f"{marker} names {path.name}, which holds no {CONTROLLER_STATE}: it was moved or damaged. "
                f"Write the number of a complete checkpoint into {marker.name}, or start anew with resume=never"
            )
        return path

    async def save(self, step: int, run: Resumable) -> None:
        """Writes the state after `step` when one is due. A crash at any point leaves the previous one usable."""
        finished = step + 1
        if not (self.is_last(step) or (self.every and finished % self.every == 0)):
            return
        target = self.directory / iteration_name(finished)
        partial = self.directory / f".partial_{iteration_name(finished)}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        await run.learner.save(partial)
        state = {
            "finished": finished,
            "experience": run.experience.state_dict(),
            "objective": run.objective.state_dict(),
            "tracker": run.tracker.state_dict(),
        }
        write_atomically(partial / CONTROLLER_STATE, json.dumps(state))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        write_atomically(self.directory / LATEST, str(finished))
        self._prune(finished)

    def stop_after(self, step: int) -> None:
        """Makes `step` the last one."""
        self.total_steps = step + 1

    async def restore(self, run: Resumable) -> int:
        """Loads the newest checkpoint, if any, into `run`; returns the number of finished steps."""
        path = self.latest()
        if path is not None:
            state = json.loads((path / CONTROLLER_STATE).read_text())
            await run.learner.restore(path)
            run.experience.load_state_dict(state["experience"])
            run.objective.load_state_dict(state["objective"])
            run.tracker.load_state_dict(state["tracker"])
            self.finished = state["finished"]
        return self.finished

    def _prune(self, finished: int) -> None:
        """Keeps the newest `keep` up to `finished`; a later one is a leftover of a crash before a resume."""
        found = {int(path.name.removeprefix("iter_")): path for path in self.directory.glob("iter_*")}
        kept = sorted(number for number in found if number <= finished)[-self.keep :]
        for number in found.keys() - kept:
            shutil.rmtree(found[number])
