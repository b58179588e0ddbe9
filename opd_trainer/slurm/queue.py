"""What SLURM says about jobs."""

import pickle
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from pathlib import Path
from typing import Any

LOG_TAIL_LINES = 30
COMMAND_TIMEOUT_S = 60
RESULT_DELAY_S = 10.0
"""How long the result of a finished job may take to appear on a network file system."""

ON_ITS_WAY = frozenset(
    {
        "PENDING",
        "RUNNING",
        "CONFIGURING",
        "COMPLETING",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "RESIZING",
        "SIGNALING",
        "SPECIAL_EXIT",
        "STAGE_OUT",
        "STOPPED",
        "SUSPENDED",
        "RESV_DEL_HOLD",
    }
)
MAY_RETURN = frozenset({"NODE_FAIL", "PREEMPTED"})
"""Ended, but SLURM may put the job back into the queue a moment later."""
GONE = "GONE"
"""SLURM does not know the job any more."""
UNREACHABLE = "UNREACHABLE"
"""SLURM does not answer; what has become of the job is unknown."""
MAY_BE_DONE = frozenset({"COMPLETED", GONE, UNREACHABLE})
"""A result that is there then counts."""


class Outcome(StrEnum):
    """How a job ended."""

    done = auto()
    """With a result."""
    failed = auto()
    """Otherwise."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job in the queue.

    Attributes:
        id: as SLURM's commands take it; 12_3 is the fourth of array 12.
        directory: of its run.
        log: of rank 0, where the controller prints.
        result: file that rank 0 leaves.
    """

    id: str
    directory: Path
    log: Path
    result: Path


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that has ended.

    Attributes:
        job: it.
        state: SLURM's word for how.
        outcome: whether there is a result.
        value: what the run returned.
        said: why it failed: its traceback, or the end of its log.
    """

    job: Submitted
    state: str
    outcome: Outcome
    value: Any = None
    said: str = ""


@dataclass(frozen=True, slots=True)
class State:
    """SLURM's word for how a job is, and while it waits, for what."""

    name: str
    reason: str = ""

    def __str__(self) -> str:
        waits = self.name == "PENDING" and self.reason not in ("", "None")
        return f"{self.name.lower()} ({self.reason})" if waits else self.name.lower()


def states(ids: Sequence[str]) -> dict[str, State]:
    """The state of each job; `GONE` where SLURM has forgotten it, `UNREACHABLE` where it cannot be asked."""
    asked = ",".join(dict.fromkeys(job_id.partition("_")[0] for job_id in ids))
    listed = _lines(["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={asked}"])
    found = {job_id: State(name, reason) for job_id, name, reason in listed or ()}
    missing = [job_id for job_id in ids if job_id not in found]
    if missing:
        # Finished a while ago; sacct knows where the site keeps accounts.
        accounts = _lines(["sacct", "-n", "-P", "-X", "-o", "JobID,State", "-j", ",".join(missing)])
        # It says "CANCELLED by 1000".
        found |= {job_id: State(name.split()[0]) for job_id, name in accounts or ()}
    unknown = State(UNREACHABLE if listed is None else GONE)
    return {job_id: found.get(job_id, unknown) for job_id in ids}


def cpus_of_nodes(partition: str | None) -> list[int]:
    """CPUs of each node of a partition (None means the default one), whatever its state; empty where sinfo fails."""
    rows = _lines(["sinfo", "--noheader", "--Node", "--format=%P|%c"]) or []
    return [
        int(cpus) for name, cpus in rows if (name.endswith("*") if partition is None else name.rstrip("*") == partition)
    ]


def _lines(command: list[str]) -> list[list[str]] | None:
    """The fields of each line of a command's output, separated by |; None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # This is an answer, which squeue gives about a job that SLURM has forgotten.
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return [line.strip().split("|") for line in done.stdout.splitlines() if "|" in line]


def ended(job: Submitted, state: str) -> Ended:
    """What became of a job that has ended, from the files that it left."""
    deadline = time.monotonic() + (RESULT_DELAY_S if state in MAY_BE_DONE else 1.0)
    while not job.result.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    if job.result.is_file():
        status, value = pickle.loads(job.result.read_bytes())
        if status == "success" and state in MAY_BE_DONE:
            return Ended(job, state, Outcome.done, value)
        if status == "error":
            return Ended(job, state, Outcome.failed, said=str(value))
    return Ended(job, state, Outcome.failed, said=tail(job.log))


def tail(log: Path) -> str:
    """The last lines of a log."""
    if not log.is_file():
        return f"{log} was not written: the job did not get as far."
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])
