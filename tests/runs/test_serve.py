"""`task=serve_teacher` and `task=serve`, with the fake server in SGLang's place."""

import json
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.runs.outages import lines_until
from tests.runs.runs import launch, start, steps, world

FAKE = "opd_trainer.sglang.fake"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=300):
            return True
    except OSError:
        return False


def test_a_run_learns_from_a_teacher_that_another_command_serves(small: Path, tmp_path: Path) -> None:
    serving = (
        "task=serve_teacher",
        "teacher=sglang_managed",
        f"teacher.load={small / 'teacher'}",
        "teacher.launch.servers=2",
        f"teacher.launch.module={FAKE}",
    )
    process = start(small, tmp_path / "served", *serving)
    try:
        printed = lines_until(process, "Ctrl-C stops")
        (told,) = [line.split() for line in printed if "opd=sglang" in line]
        # A shell takes the quotes away.
        overrides = [word.strip("'") for word in told]
        assert launch(small, tmp_path / "run", *overrides, "teacher.check_trained=false", "steps=2") == 0
        assert all(line["teacher/failed_fraction"] == 0 for line in steps(tmp_path / "run"))
        urls = overrides[-1].partition("=")[2].strip('"').split(",")
        assert len(urls) == 2
        assert all(answers(url) for url in urls)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 0
        assert not any(answers(url) for url in urls)
    finally:
        process.kill()
        process.communicate()


def test_a_students_server_is_started_again(small: Path, tmp_path: Path) -> None:
    serving = ("task=serve", "rollout=sglang", f"rollout.launch.module={FAKE}")
    process = start(small, tmp_path / "served", *serving)
    try:
        (command,) = [line.split() for line in lines_until(process, "Ctrl-C stops") if "curl" in line]
        url = command[1].removesuffix("/generate")
        body = {"input_ids": [3, 4, 5], "sampling_params": {"max_new_tokens": 4}}
        request = urllib.request.Request(f"{url}/generate", data=json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=300) as response:
            assert json.load(response)["meta_info"]["completion_tokens"] >= 1
        port = url.rpartition(":")[2]
        found = subprocess.run(
            ["pgrep", "-f", f"^[^ ]+ -m {FAKE} .*--port {port}"], capture_output=True, text=True, check=True
        )
        subprocess.run(["kill", "-9", *found.stdout.split()], check=True)
        lines_until(process, "started again")
        assert answers(url)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) == 0
        assert not answers(url)
    finally:
        process.kill()
        process.communicate()
