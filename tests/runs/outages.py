"""Runs of `launch.py` whose servers die on the way; the same for the fake server and for a real one."""

import asyncio
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opd_trainer.sglang.config import LaunchConfig
from opd_trainer.sglang.faults import Fault
from opd_trainer.sglang.fleet import Fleet
from tests.runs.runs import start, steps

PROMPTS, SIBLINGS = 4, 2
"""Of a step, see `tests.runs.runs.arguments`."""


def logged(output: Path) -> list[dict[str, Any]]:
    """The steps that are done."""
    return steps(output) if (output / "metrics.jsonl").exists() else []


def until(process: "subprocess.Popen[str]", what: Callable[[], bool], limit_s: float) -> None:
    """Waits while the run runs."""
    deadline = time.monotonic() + limit_s
    while not what():
        if process.poll() is not None:
            assert what(), process.communicate()[0]
            return
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


def lines_until(process: "subprocess.Popen[str]", text: str) -> list[str]:
    """What a process prints, up to a line with `text`."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines))


def processes(*words: str) -> list[int]:
    """Processes whose command line has all the words; not the wrappers that wait for them."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (
                (entry / "cmdline").read_bytes().decode(errors="replace").split("\0") if entry.name.isdigit() else []
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
        if all(word in command for word in words) and not any("die_with_parent" in part for part in command):
            found.append(int(entry.name))
    return found


def complete(output: Path, number: int) -> None:
    """Every step has each of its samples once, and nothing was dropped."""
    lines = logged(output)
    assert len(lines) == number
    assert all(line["rollout/dropped"] == 0 for line in lines)
    per_step: dict[int, Counter[tuple[str, int]]] = {}
    for line in (output / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        per_step.setdefault(sample["step"], Counter())[sample["prompt_id"], sample["index"]] += 1
    assert len(per_step) == number
    for counts in per_step.values():
        assert len(counts) == PROMPTS * SIBLINGS
        assert set(counts.values()) == {1}


def inject(url: str, fault: Fault, seconds: float) -> None:
    """Has the fake server at `url` spoil its next answer that is not spoiled yet."""
    body = json.dumps({"kind": fault, "seconds": seconds}).encode()
    request = urllib.request.Request(f"{url}/fake/fault", data=body, headers={"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=300).close()


def rollout_server_dies(world: Path, output: Path, overrides: Sequence[str], limit_s: float) -> None:
    """kill -9 of the server that generates, in the middle of a run."""
    number = 8
    mine = (
        "rollout=sglang",
        f"steps={number}",
        "eval.every=0",
        "eval.reverse_kl_prompts=0",
        "tracking.samples_per_step=1000",
    )
    process = start(world, output, *mine, *overrides)
    try:
        until(process, lambda: len(logged(output)) >= 1, limit_s)
        for pid in processes("--model-path", str(world / "student"), "--port"):
            os.kill(pid, signal.SIGKILL)
        printed, _ = process.communicate(timeout=limit_s)
        assert process.returncode == 0, printed
    finally:
        process.kill()
        process.communicate()
    complete(output, number)
    assert sum(line["rollout/restarts"] for line in logged(output)[-1:]) == 1
    # The server that came back had the weights of the version that it was asked for.
    assert all(line["train/rollout_log_prob_diff"] < 1e-3 for line in logged(output))


def teacher_is_away(world: Path, output: Path, launch: LaunchConfig, overrides: Sequence[str], limit_s: float) -> None:
    """kill -9 of somebody's teacher; its samples are masked, and it is used again when it is back."""
    number = 40
    fleet = Fleet.launch("teacher", str(world / "teacher"), launch, output.with_suffix(".logs"))
    asyncio.run(fleet.start())
    (url,) = fleet.urls
    served = ("opd=sglang", "teacher=sglang_external", f"teacher.url={url}", "teacher.check_trained=false")
    patient = ("teacher.max_failed_fraction=1.0", "teacher.attempts=4", "teacher.timeout_s=20")
    mine = (*served, *patient, f"steps={number}", "eval.every=0", "eval.reverse_kl_prompts=0")
    process = start(world, output, *mine, *overrides)
    try:
        until(process, lambda: len(logged(output)) >= 2, limit_s)
        (server,) = fleet.servers.values()
        assert server.pid is not None
        os.killpg(server.pid, signal.SIGKILL)
        until(process, lambda: any(line["teacher/failed_fraction"] == 1.0 for line in logged(output)), limit_s)
        # The run stands still meanwhile, or it could be over before the teacher is back.
        process.send_signal(signal.SIGSTOP)
        assert asyncio.run(fleet.ensure(url))
        process.send_signal(signal.SIGCONT)
        printed, _ = process.communicate(timeout=limit_s)
        assert process.returncode == 0, printed
    finally:
        process.kill()
        process.communicate()
        asyncio.run(fleet.close())
    lines = logged(output)
    assert len(lines) == number
    failed = [line["teacher/failed_fraction"] for line in lines]
    assert failed[0] == failed[-1] == 0.0
    assert 1.0 in failed
    for line, fraction in zip(lines, failed, strict=True):
        counts = {key.rpartition("/")[2]: value for key, value in line.items() if key.startswith("teacher/status/")}
        assert sum(counts.values()) == PROMPTS * SIBLINGS
        assert counts.get("ok", 0) == (1 - fraction) * PROMPTS * SIBLINGS
        # No teacher, no opinion: not a reverse KL of 0, as if the two agreed.
        assert ("opd/reverse_kl" in line) == (fraction < 1.0)
