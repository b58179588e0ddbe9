"""kill -9 of Ray workers in the middle of a run: it goes on, to the same numbers, or says what happened."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs.runs import distil, lines, start, steps, summary, world

pytestmark = pytest.mark.ray

STEPS = ("steps=40", "checkpoint.every=10", "cluster=ray", "cluster.num_workers=1", "tracking.console=true")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def uninterrupted(small: Path) -> Path:
    output = small / "uninterrupted"
    process = start(small, output, *distil(small), *STEPS)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    return output


def learned(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what tells of deaths."""
    return [{key: value for key, value in step.items() if key != "rollout/restarts"} for step in steps(output)]


def killed(small: Path, output: Path, group: str, *overrides: str) -> tuple[int, str, float]:
    """A run of which a worker is killed after five steps, or a little later: exit code, output, seconds to its end."""
    process = start(small, output, *distil(small), *STEPS, *overrides)
    assert process.stdout is not None
    printed, worker = "", None
    while worker is None:
        line = process.stdout.readline()
        assert line, printed
        printed += line
        worker = re.match(rf"  {group} 0: process (\d+) at ", line)
    while lines(output) < 5:
        assert process.poll() is None, printed
        time.sleep(0.01)
    os.kill(int(worker[1]), signal.SIGKILL)
    began = time.monotonic()
    rest, _ = process.communicate(timeout=900)
    return process.returncode, printed + rest, time.monotonic() - began


def test_training_goes_on_from_the_newest_checkpoint(small: Path, uninterrupted: Path, tmp_path: Path) -> None:
    code, printed, _ = killed(small, tmp_path / "run", "training", "cluster.max_restarts=1")
    assert code == 0, printed
    assert "training: a worker died" in printed
    assert "restart 1 of 1, from the newest checkpoint" in printed
    assert learned(tmp_path / "run") == learned(uninterrupted)
    assert summary(tmp_path / "run")["evaluation"] == summary(uninterrupted)["evaluation"]


def test_an_engine_is_replaced_alone(small: Path, uninterrupted: Path, tmp_path: Path) -> None:
    code, printed, _ = killed(small, tmp_path / "run", "rollout", "cluster.max_restarts=1")
    assert code == 0, printed
    assert "rollout workers [0] are new" in printed
    assert "newest checkpoint" not in printed
    assert steps(tmp_path / "run")[-1]["rollout/restarts"] == 1
    assert learned(tmp_path / "run") == learned(uninterrupted)


def test_without_restarts_the_run_ends_within_seconds(small: Path, tmp_path: Path) -> None:
    code, printed, seconds = killed(small, tmp_path / "run", "training")
    assert code == 1
    assert "training: a worker died" in printed
    # Far less than the time limit of a call, after which a death would be noticed anyway.
    assert seconds < 300
