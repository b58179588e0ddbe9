"""Whole runs through a real SLURM of two nodes on this machine."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs.runs import ROOT, arguments, column, distil, lines, steps, summary, world
from tests.slurm.cluster import SlurmTestCluster, processes

pytestmark = pytest.mark.slurm

NUM_STEPS = 12
"""So many that a signal after the second of them reaches a job well before its end, also on a busy machine."""
LONG = (f"steps={NUM_STEPS}", "checkpoint.every=0")
"""Nothing is saved before the last step unless somebody asks for it."""


def job(world: Path, output: Path, *overrides: str) -> list[str]:
    """The command line of a job with one training worker."""
    return [
        sys.executable,
        str(ROOT / "launch.py"),
        *arguments(world, output, *distil(world)),
        "cluster=slurm",
        "cluster.num_workers=1",
        "cluster.cpus_per_node=2",
        "cluster.threads=1",
        "hydra.launcher.timeout_min=60",
        "tracking.console=true",
        *overrides,
    ]


def submit(slurm: SlurmTestCluster, world: Path, output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    return subprocess.run(
        job(world, output, *overrides),
        cwd=world,
        env=slurm.env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@contextlib.contextmanager
def submitted(slurm: SlurmTestCluster, world: Path, output: Path, *overrides: str) -> Iterator[tuple[str, "Waiting"]]:
    """The id of a job for which a command waits; the command is ended at the end."""
    process = subprocess.Popen(
        job(world, output, *overrides),
        cwd=world,
        env=slurm.env | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    waiting = Waiting(process)
    try:
        yield waiting.job(), waiting
    finally:
        process.kill()
        process.communicate()


class Waiting:
    """A command that waits for its job."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said = ""

    def job(self) -> str:
        """The id of the job, once it is in the queue."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if found := re.match(r"submitted job (\d+):", line):
                return found[1]
        raise AssertionError(self.said)

    def end(self, timeout_s: float = 900) -> int:
        """The exit code."""
        rest, _ = self.process.communicate(timeout=timeout_s)
        self.said += rest
        return self.process.returncode


def start_again(slurm: SlurmTestCluster, job_id: str) -> None:
    """Starts a requeued job at once, which SLURM would hold back for two minutes."""
    # Its credential must be a new one, and credentials count seconds.
    time.sleep(3)
    slurm.start_now(job_id)


def wait_for_steps(slurm: SlurmTestCluster, job_id: str, output: Path, number: int) -> None:
    """Returns after so many steps of a run."""
    deadline = time.monotonic() + 900
    while lines(output) < number:
        assert slurm.state(job_id) in ("PENDING", "RUNNING", "COMPLETING"), slurm.state(job_id)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def left_behind(output: Path) -> list[str]:
    """Command lines of processes that still work for a run."""
    found = []
    for pid, _, command in processes():
        with contextlib.suppress(OSError):
            environment = (Path("/proc") / str(pid) / "environ").read_bytes()
            if f"{output}/slurm".encode() in environment and "launch.py" not in command:
                found.append(command[:150])
    return found


def nothing_is_left_behind(output: Path) -> None:
    """Waits a moment for processes to end."""
    deadline = time.monotonic() + 120
    while left := left_behind(output):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


@pytest.fixture(scope="module")
def uninterrupted(slurm: SlurmTestCluster, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job."""
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    done = submit(slurm, small, output, *LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def test_a_single_job(slurm: SlurmTestCluster, uninterrupted: Path) -> None:
    assert len(steps(uninterrupted)) == NUM_STEPS
    assert summary(uninterrupted)["git"] is not None
    assert json.loads((uninterrupted / "run.json").read_text())["status"] == "finished"
    nothing_is_left_behind(uninterrupted)


def test_wait_false_returns_and_a_queued_job_runs_what_was_submitted(
    slurm: SlurmTestCluster, small: Path, tmp_path: Path
) -> None:
    experiment = tmp_path / "conf" / "experiment" / "mine.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text("# @package _global_\nsteps: 1\neval: {reverse_kl_prompts: 0}\n")
    output = tmp_path / "run"
    later = "+hydra.launcher.additional_parameters.begin=now+3600"
    began = [
        word for word in job(small, output, "cluster.wait=false", later) if not word.startswith(("steps=", "eval.rev"))
    ]
    command = [*began, f"--config-dir={experiment.parents[1]}"]
    command[command.index("experiment=null")] = "experiment=mine"
    environment = slurm.env | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=small, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"submitted job (\d+): run directory (\S+), log (\S+)", done.stdout)
    assert found, done.stdout
    assert slurm.state(found[1]) == "PENDING"
    experiment.write_text("# @package _global_\nsteps: 5\n")
    slurm.start_now(found[1])
    slurm.until(found[1], "COMPLETED", timeout_s=900)
    assert Path(found[2]) == output
    assert "completed successfully" in Path(found[3]).read_text()
    assert len(steps(output)) == 1


def test_a_sweep_is_an_array(slurm: SlurmTestCluster, small: Path, tmp_path: Path) -> None:
    done = submit(slurm, small, tmp_path / "sweep", "-m", "seed=0,1", "steps=1")
    assert done.returncode == 0, done.stdout + done.stderr
    ids = re.findall(r"submitted job (\d+)_(\d+):", done.stdout)
    assert len({array for array, _ in ids}) == 1
    assert [number for _, number in ids] == ["0", "1"]
    runs = sorted((tmp_path / "sweep").glob("seed-*/metrics.jsonl"))
    assert len(runs) == 2
    assert list(column(runs[0].parent, "train/loss")) != list(column(runs[1].parent, "train/loss"))


def test_two_nodes_are_one_ray(slurm: SlurmTestCluster, small: Path, uninterrupted: Path, tmp_path: Path) -> None:
    done = submit(slurm, small, tmp_path / "two", *LONG, "cluster.nodes=2", "cluster.num_workers=2")
    assert done.returncode == 0, done.stdout + done.stderr
    (log,) = (tmp_path / "two" / "slurm").glob("*/*_0_log.out")
    printed = log.read_text()
    assert re.search(r"127\.0\.1\.1: 2 CPUs, 0 GPUs\n +CPU: training 0", printed), printed
    assert re.search(r"127\.0\.1\.2: 2 CPUs, 0 GPUs\n +CPU: training 1", printed), printed
    for metric in ("train/loss", "train/grad_norm", "opd/reverse_kl"):
        ours = list(column(tmp_path / "two", metric))
        assert ours == pytest.approx(list(column(uninterrupted, metric)), rel=1e-3, abs=1e-5)
    nothing_is_left_behind(tmp_path / "two")


def test_a_failing_job_is_failed_and_says_why(slurm: SlurmTestCluster, tmp_path: Path) -> None:
    broken = world(tmp_path)
    # Whoever looks at shapes and tokenizers only does not see this.
    weights = broken / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = submit(slurm, broken, tmp_path / "run")
    assert done.returncode == 1, done.stdout + done.stderr
    found = re.search(r"submitted job (\d+):", done.stdout)
    assert found
    assert slurm.state(found[1]) == "FAILED"
    assert f"job {found[1]} FAILED" in done.stderr
    (log,) = (tmp_path / "run" / "slurm").glob("*/*_0_log.out")
    for text in (done.stderr, log.read_text()):
        assert "Traceback" in text
        assert "safetensors" in text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    nothing_is_left_behind(tmp_path / "run")


def test_a_preempted_job_saves_returns_and_ends_with_the_same_numbers(
    slurm: SlurmTestCluster, small: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with submitted(slurm, small, output, *LONG) as (job_id, waiting):
        wait_for_steps(slurm, job_id, output, 2)
        slurm.run("scancel", "--signal=USR2", job_id)
        slurm.until(job_id, "PENDING")
        assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
        saved = int((output / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
        assert 2 <= saved < NUM_STEPS
        start_again(slurm, job_id)
        assert waiting.end() == 0, waiting.said
    assert slurm.show(job_id)["Restarts"] == "1"
    assert steps(output) == steps(uninterrupted)
    assert summary(output)["evaluation"] == summary(uninterrupted)["evaluation"]


def test_a_cancelled_job_leaves_nothing_behind(slurm: SlurmTestCluster, small: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with submitted(slurm, small, output, "steps=200", "cluster.nodes=2", "cluster.num_workers=2") as (job_id, waiting):
        wait_for_steps(slurm, job_id, output, 1)
        assert left_behind(output)
        slurm.run("scancel", job_id)
        assert waiting.end() == 1, waiting.said
    assert f"job {job_id} CANCELLED" in waiting.said
    nothing_is_left_behind(output)


def test_what_slurm_cannot_give_is_refused_at_once(slurm: SlurmTestCluster, small: Path, tmp_path: Path) -> None:
    cases = {
        ("cluster.nodes=3",): "the default partition has 2 nodes",
        ("cluster.cpus_per_node=64",): "the largest with 4 CPUs, and 0 that will do",
        ("cluster.gpus_per_node=8",): "SLURM does not take the job: sbatch: error: Invalid generic resource",
        ("cluster.num_workers=64",): "64 training workers of 0.5 CPU",
    }
    for overrides, said in cases.items():
        done = submit(slurm, small, tmp_path / "run", *overrides)
        assert done.returncode == 2, done.stdout + done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert not slurm.run("squeue", "-h", "-o", "%i")


def test_a_job_that_loses_a_node_continues_on_another(
    slurm: SlurmTestCluster, small: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    two_nodes = ("cluster.nodes=2", "cluster.num_workers=2", "cluster.start_timeout_s=200")
    wanted = (f"steps={NUM_STEPS}", "checkpoint.every=1", *two_nodes)
    with submitted(slurm, small, output, *wanted) as (job_id, waiting):
        wait_for_steps(slurm, job_id, output, 2)
        slurm.kill_node(2)
        slurm.until(job_id, "PENDING", timeout_s=600)
        slurm.start_node(2)
        start_again(slurm, job_id)
        assert waiting.end() == 0, waiting.said
    assert int(slurm.show(job_id)["Restarts"]) >= 1
    ours, theirs = (list(column(run, "train/loss")) for run in (output, uninterrupted))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    nothing_is_left_behind(output)


def test_a_task_that_is_killed_takes_the_job_with_it(slurm: SlurmTestCluster, small: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    wanted = ("steps=200", "cluster.nodes=2", "cluster.num_workers=2", "cluster.max_restarts=0")
    with submitted(slurm, small, output, *wanted) as (job_id, waiting):
        wait_for_steps(slurm, job_id, output, 1)
        (member,) = (pid for pid, _, command in processes() if is_rank_one(pid, command, output))
        os.kill(member, signal.SIGKILL)
        assert waiting.end() == 1, waiting.said
    assert slurm.state(job_id) == "FAILED"
    nothing_is_left_behind(output)


def is_rank_one(pid: int, command: str, output: Path) -> bool:
    """Whether a process is the task of the second node."""
    if "submitit.core._submit" not in command or str(output) not in command or "srun" in command:
        return False
    return b"SLURM_PROCID=1" in (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
