"""Checkpoints of a run: atomic, keep-last-n, exact on resume.

Layout of the directory, after Megatron-LM's conventions so that any of ours can be loaded as a model:

    latest_checkpointed_iteration.txt   the number of finished steps of the newest complete checkpoint
    iter_0000020/controller.json        step, data cursor, controller and tracker state
    iter_0000020/...                    what the learner writes: weights, optimizer, scheduler, RNG
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from opd_trainer.errors import CheckpointError, Interrupted
from opd_trainer.files import publish, unwritable, write_atomically
from opd_trainer.model.folder import LATEST

CONTROLLER_STATE = "controller.json"
PARTIAL = ".partial_"
"""Begins the name of a checkpoint that is being written or deleted."""


class Stateful(Protocol):
    """Something whose state is a JSON-able dictionary."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        ...


class WritesFiles(Protocol):
    """The part of a `Learner` that saves and restores."""

    async def save(self, directory: Path, *, background: bool = False) -> None:
        """See `Learner`."""
        ...

    async def finish_save(self, *, wait: bool) -> bool:
        """See `Learner`."""
        ...

    async def restore(self, directory: Path) -> None:
        """See `Learner`."""
        ...


class Resumable(Protocol):
    """What a checkpoint holds."""

    @property
    def learner(self) -> WritesFiles:
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


def iteration_of(name: str) -> int | None:
    """The inverse of `iteration_name`; None for any other name."""
    digits = name.removeprefix("iter_")
    return int(digits) if digits.isdecimal() and iteration_name(int(digits)) == name else None


@dataclass(slots=True)
class Checkpoints:
    """Saves every `every` steps and after the last one, keeps the newest `keep`.

    Attributes:
        directory: where the `iter_*` directories go.
        every: steps between checkpoints; 0 saves only after the last step.
        keep: how many to keep, at least 1.
        total_steps: steps of the whole run.
        background: whether training goes on while a checkpoint is written. It is complete, and counts, from the step
            after the last file is written; the next one, and the end of the run, wait for it.
        asked_to_stop: whether the run shall save after the step that is under way, and end.
        finished: steps that are done; set by `restore`.
    """

    directory: Path
    every: int
    keep: int
    total_steps: int
    background: bool = False
    asked_to_stop: Callable[[], bool] = lambda: False
    finished: int = field(default=0)
    _writing: int | None = field(default=None, init=False)

    def steps(self) -> Iterator[int]:
        """The steps that are left, counted from 0."""
        while self.finished < self.total_steps:
            yield self.finished
            self.finished += 1

    def is_last(self, step: int) -> bool:
        """Whether no step follows `step`."""
        return step + 1 >= self.total_steps

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None where nothing was saved.

        Raises:
            CheckpointError: the one that the marker names is not there.
        """
        marker = self.directory / LATEST
        if not marker.is_file():
            return None
        named = marker.read_text().strip()
        path = self.directory / (iteration_name(int(named)) if named.isdigit() else repr(named))
        if not (path / CONTROLLER_STATE).is_file():
            raise CheckpointError(
                f"{marker} names {path.name}, which holds no {CONTROLLER_STATE}: it was moved or damaged. "
                f"Write the number of a complete checkpoint into {marker.name}, or start anew with resume=never"
            )
        return path

    async def save(self, step: int, run: Resumable) -> None:
        """Writes the state after `step` when one is due. A crash at any point leaves the previous one usable.

        Raises:
            CheckpointError: it cannot be written; the disk is full, for one.
            Interrupted: it is written, and the run shall end.
        """
        finished = step + 1
        stopping = not self.is_last(step) and self.asked_to_stop()
        due = stopping or self.is_last(step) or (self.every > 0 and finished % self.every == 0)
        try:
            await self._complete(run, wait=due)
            if due:
                await self._write(finished, run)
                await self._complete(run, wait=stopping or not self.background or self.is_last(step))
        except OSError as error:
            raise unwritable(self.directory, error) from error
        if stopping:
            raise Interrupted(
                f"asked to stop: saved after step {finished} of {self.total_steps} in {self.directory}; "
                "the same command with resume=auto goes on from there"
            )

    async def _complete(self, run: Resumable, *, wait: bool) -> None:
        """Gives the checkpoint that is being written its name, if it is written or `wait` is set."""
        if self._writing is None or not await run.learner.finish_save(wait=wait):
            return
        finished, self._writing = self._writing, None
        target, partial = self._paths(finished)
        shutil.rmtree(target, ignore_errors=True)
        publish(partial, target)
        write_atomically(self.directory / LATEST, str(finished))
        self._prune(finished)

    async def _write(self, finished: int, run: Resumable) -> None:
        """Writes a checkpoint, or begins to; it has its name after `_complete`."""
        _, partial = self._paths(finished)
        for leftover in self.directory.glob(f"{PARTIAL}*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        await run.learner.save(partial, background=self.background)
        state = {
            "finished": finished,
            "experience": run.experience.state_dict(),
            "objective": run.objective.state_dict(),
            "tracker": run.tracker.state_dict(),
        }
        write_atomically(partial / CONTROLLER_STATE, json.dumps(state))
        self._writing = finished

    def stop_after(self, step: int) -> None:
        """Makes `step` the last one."""
        self.total_steps = step + 1

    async def restore(self, run: Resumable) -> int:
        """Loads the newest checkpoint, if any, into `run`; returns the number of finished steps.

        Raises:
            CheckpointError: it is damaged, or not of this run's model.
        """
        path = self.latest()
        if path is not None:
            state = json.loads((path / CONTROLLER_STATE).read_text())
            await run.learner.restore(path)
            run.experience.load_state_dict(state["experience"])
            run.objective.load_state_dict(state["objective"])
            run.tracker.load_state_dict(state["tracker"])
            self.finished = state["finished"]
        return self.finished

    def _paths(self, finished: int) -> tuple[Path, Path]:
        """Where a checkpoint lies, and where it lies while it is not complete."""
        name = iteration_name(finished)
        return self.directory / name, self.directory / f"{PARTIAL}{name}"

    def _prune(self, finished: int) -> None:
        """Keeps the newest `keep` up to `finished`; a later one is a leftover of a crash before a resume."""
        # What somebody put beside them under another name (iter_0000100_best) is no affair of ours.
        numbers = [iteration_of(path.name) for path in self.directory.glob("iter_*")]
        found = {number for number in numbers if number is not None}
        kept = sorted(number for number in found if number <= finished)[-self.keep :]
        for number in found.difference(kept):
            path, partial = self._paths(number)
            # Under its name a checkpoint is complete, also while it is deleted.
            path.rename(partial)
            shutil.rmtree(partial)
