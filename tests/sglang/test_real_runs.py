"""Whole runs of `launch.py` on real SGLang servers on CPU (`make test-sglang`), with servers that die on the way."""

import json
import signal
import urllib.request
from pathlib import Path

import pytest

from opd_trainer.sglang.config import LaunchConfig
from tests.runs.outages import lines_until, rollout_server_dies, teacher_is_away
from tests.runs.runs import start, world
from tests.sglang.real import launch

pytestmark = pytest.mark.sglang

LIMIT_S = 900.0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


def settings(owner: str) -> list[str]:
    """What SGLang needs here."""
    config: LaunchConfig = launch()
    names = ("python", "dtype", "start_timeout_s")
    return [f"{owner}.launch.{name}={getattr(config, name)}" for name in names]


def test_kill_9_of_the_rollout_server_in_the_middle_of_a_run(small: Path, tmp_path: Path) -> None:
    """No sample is lost or doubled, and training goes on; memory is given back and taken again in every step."""
    teacher = [
        "opd=sglang",
        "teacher=sglang_managed",
        f"teacher.load={small / 'teacher'}",
        "teacher.check_trained=false",
    ]
    overrides = [*teacher, *settings("teacher"), *settings("rollout"), "rollout.release_memory=true"]
    rollout_server_dies(small, tmp_path / "run", overrides, LIMIT_S)


def test_the_teacher_is_down_for_a_part_of_a_run(small: Path, tmp_path: Path) -> None:
    teacher_is_away(small, tmp_path / "run", launch(), [], LIMIT_S)


def test_a_served_student_takes_text(small: Path, tmp_path: Path) -> None:
    process = start(small, tmp_path / "served", "task=serve", "rollout=sglang", *settings("rollout"))
    try:
        (command,) = [line.split() for line in lines_until(process, "Ctrl-C stops") if "curl" in line]
        body = {"text": "1+2=", "sampling_params": {"max_new_tokens": 4, "temperature": 0.0}}
        request = urllib.request.Request(
            command[1], data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            answer = json.load(response)
        assert answer["meta_info"]["prompt_tokens"] == 4
        assert isinstance(answer["text"], str)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
        process.communicate()
