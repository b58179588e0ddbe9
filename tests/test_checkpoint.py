"""Atomicity, pruning and resumption of controller checkpoints, with a learner that writes one file."""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from opd_trainer.checkpoint import CONTROLLER_STATE, Checkpoints
from opd_trainer.errors import CheckpointError, Interrupted
from opd_trainer.model.folder import LATEST


@dataclass
class Part:
    value: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@dataclass
class FileLearner:
    weights: float = 0.0
    crash: bool = False
    finished: bool = True
    waited: int = 0

    async def save(self, directory: Path, *, background: bool = False) -> None:
        self.finished = not background
        (directory / "weights").write_text(str(self.weights))
        if self.crash:
            raise KeyboardInterrupt

    async def finish_save(self, *, wait: bool) -> bool:
        self.finished = self.finished or wait
        self.waited += wait
        return self.finished

    async def restore(self, directory: Path) -> None:
        self.weights = float((directory / "weights").read_text())


@dataclass
class Run:
    learner: FileLearner = field(default_factory=FileLearner)
    experience: Part = field(default_factory=Part)
    objective: Part = field(default_factory=Part)
    tracker: Part = field(default_factory=Part)


def train(run: Run, checkpoints: Checkpoints) -> None:
    for step in checkpoints.steps():
        run.learner.weights += 1.0
        run.experience.value = 10 * (step + 1)
        asyncio.run(checkpoints.save(step, run))


def test_saves_when_due_and_keeps_the_newest(tmp_path: Path) -> None:
    train(Run(), Checkpoints(directory=tmp_path, every=2, keep=2, total_steps=7))
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000006", "iter_0000007"]
    assert (tmp_path / LATEST).read_text() == "7"


def test_restores_everything_and_goes_on_with_the_next_step(tmp_path: Path) -> None:
    train(Run(), Checkpoints(directory=tmp_path, every=2, keep=2, total_steps=4))
    resumed, checkpoints = Run(), Checkpoints(directory=tmp_path, every=2, keep=2, total_steps=6)
    assert asyncio.run(checkpoints.restore(resumed)) == 4
    assert (resumed.learner.weights, resumed.experience.value) == (4.0, 40)
    assert list(checkpoints.steps()) == [4, 5]


def test_nothing_to_restore_is_a_fresh_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(directory=tmp_path / "none", every=1, keep=1, total_steps=2)
    assert asyncio.run(checkpoints.restore(Run())) == 0


def test_a_crash_while_saving_leaves_the_previous_checkpoint_usable(tmp_path: Path) -> None:
    run = Run()
    train(run, Checkpoints(directory=tmp_path, every=1, keep=1, total_steps=1))
    run.learner.crash = True
    with pytest.raises(KeyboardInterrupt):
        train(run, Checkpoints(directory=tmp_path, every=1, keep=1, total_steps=2, finished=1))
    resumed, checkpoints = Run(), Checkpoints(directory=tmp_path, every=1, keep=1, total_steps=3)
    assert asyncio.run(checkpoints.restore(resumed)) == 1
    train(resumed, checkpoints)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000003", LATEST]


def test_a_leftover_later_than_the_marker_is_never_preferred(tmp_path: Path) -> None:
    run = Run()
    train(run, Checkpoints(directory=tmp_path, every=1, keep=1, total_steps=1))
    leftover = tmp_path / "iter_0000009"
    leftover.mkdir()
    (leftover / CONTROLLER_STATE).write_text(json.dumps({"finished": 9}))
    checkpoints = Checkpoints(directory=tmp_path, every=1, keep=1, total_steps=2)
    assert asyncio.run(checkpoints.restore(run)) == 1
    train(run, checkpoints)
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000002"]


def test_a_copy_under_another_name_is_left_alone(tmp_path: Path) -> None:
    for name in ("iter_0000001_best", "iter_2", "iter_"):
        (tmp_path / name).mkdir()
    train(Run(), Checkpoints(directory=tmp_path, every=1, keep=1, total_steps=3))
    found = sorted(path.name for path in tmp_path.glob("iter_*"))
    assert found == ["iter_", "iter_0000001_best", "iter_0000003", "iter_2"]


@pytest.mark.parametrize(("marker", "named"), [("5", "iter_0000005"), ("release\n", "'release'"), ("", "''")])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, marker: str, named: str) -> None:
    (tmp_path / LATEST).write_text(marker)
    checkpoints = Checkpoints(directory=tmp_path, every=1, keep=1, total_steps=9)
    with pytest.raises(CheckpointError, match=f"names {named}, which holds no controller.json.*resume=never"):
        checkpoints.latest()


def test_stopping_early_makes_the_step_the_last_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(directory=tmp_path, every=0, keep=1, total_steps=100)
    seen = []
    for step in checkpoints.steps():
        seen.append(step)
        if step == 2:
            checkpoints.stop_after(step)
            assert checkpoints.is_last(step)
    assert seen == [0, 1, 2]


def test_in_the_background_a_checkpoint_counts_once_it_is_written(tmp_path: Path) -> None:
    run, checkpoints = Run(), Checkpoints(directory=tmp_path, every=2, keep=2, total_steps=7, background=True)
    marked = []
    for step in checkpoints.steps():
        run.learner.weights += 1.0
        run.experience.value = 10 * (step + 1)
        # The files of the checkpoint after step 2 are there by step 3; those of the one after step 4 never are.
        run.learner.finished = run.learner.finished or step == 2
        asyncio.run(checkpoints.save(step, run))
        marked.append((tmp_path / LATEST).read_text() if (tmp_path / LATEST).exists() else None)
    # Saves after steps 2, 4, 6 and 7: the third waits for the second, the last for the third and for itself.
    assert marked == [None, None, "2", "2", "2", "4", "7"]
    assert run.learner.waited == 3
    resumed = Run()
    assert asyncio.run(Checkpoints(directory=tmp_path, every=2, keep=2, total_steps=7).restore(resumed)) == 7
    assert (resumed.learner.weights, resumed.experience.value) == (7.0, 70)
    # The state is that of the step, although later steps went on while it was written.
    state = json.loads((tmp_path / "iter_0000006" / CONTROLLER_STATE).read_text())
    assert state["experience"]["value"] == 60


def test_a_disk_that_is_full_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*bytes free.*resume=auto"):
        train(Run(), Checkpoints(directory=tmp_path, every=1, keep=1, total_steps=1))


@pytest.mark.parametrize("background", [False, True])
def test_a_run_that_is_asked_to_stop_saves_at_the_end_of_its_step(tmp_path: Path, background: bool) -> None:
    settings: dict[str, Any] = {
        "directory": tmp_path,
        "every": 0,
        "keep": 1,
        "total_steps": 6,
        "background": background,
    }
    run = Run()
    checkpoints = Checkpoints(**settings, asked_to_stop=lambda: run.experience.value >= 30)
    with pytest.raises(Interrupted, match="saved after step 3 of 6"):
        train(run, checkpoints)
    resumed, later = Run(), Checkpoints(**settings)
    assert asyncio.run(later.restore(resumed)) == 3
    train(resumed, later)
    assert resumed.learner.weights == 6.0


def test_the_last_step_is_the_end_anyway(tmp_path: Path) -> None:
    checkpoints = Checkpoints(directory=tmp_path, every=0, keep=1, total_steps=2, asked_to_stop=lambda: True)
    checkpoints.finished = 1
    train(Run(), checkpoints)
    assert (tmp_path / LATEST).read_text() == "2"
