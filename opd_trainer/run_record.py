"""What a run directory says about its run: `run.json` with the configuration's hash and the status."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum, auto
from pathlib import Path
from typing import Any

from opd_trainer.config import Config
from opd_trainer.errors import UserError
from opd_trainer.files import write_atomically

RUN_FILE = "run.json"
LOCK_FILE = ".lock"

NOT_OF_THE_RESULT = frozenset({"name", "output_dir", "resume", "checkpoint", "tracking"})
"""Keys that change where and how often things are written, not what is computed."""
ATTENDANCE = frozenset({"address", "wait", "start_timeout_s", "grace_s", "max_restarts"})
"""Keys of `cluster` that change who waits for what, and how often something is tried."""

LAYOUT = frozenset(
    {
        "tensor_parallel",
        "pipeline_parallel",
        "pipeline_layers",
        "context_parallel",
        "expert_parallel",
        "sequence_parallel",
        "recompute",
        "distributed_optimizer",
        "max_tokens_per_device",
        "log_prob_chunk_tokens",
        "timeout_s",
    }
)
"""Keys of `megatron` that change where a number is computed, and the number by rounding only."""
WHO_TEACHES = ("load", "ckpt_step", "model", "on_failure", "max_failed_fraction")
"""Keys of a teacher that say who it is; the others say where, and servers move."""


class RunStatus(StrEnum):
    """How far a run has come."""

    running = auto()
    """At work, or killed without a chance to say so."""
    finished = auto()
    """All steps are done."""
    failed = auto()
    """Ended by an exception."""
    interrupted = auto()
    """Saved and stopped because somebody asked it to."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run directory says about itself.

    Attributes:
        directory: of the run.
        config_hash: of its configuration.
        resume_hash: of what of its configuration a run that continues it must share.
        status: how far it has come.
        error: what ended a failed run, in a line.
        modified: when this was written, seconds since the epoch.
    """

    directory: Path
    config_hash: str
    resume_hash: str
    status: RunStatus
    error: str | None
    modified: float


def plain(value: Any) -> Any:
    """A configuration as dictionaries, lists and scalars; each dataclass names itself as "schema"."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"schema": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def config_hash(config: Config) -> str:
    """16 hex digits; equal for two configurations that compute the same thing in the same way."""
    content = {name: value for name, value in plain(config).items() if name not in NOT_OF_THE_RESULT}
    content["cluster"] = {name: value for name, value in content["cluster"].items() if name not in ATTENDANCE}
    return _digest(content)


def resume_hash(config: Config) -> str:
    """16 hex digits; equal for two configurations of which one may continue a run of the other.

    What is computed must be the same; on how many workers, in which parallel layout, and where the teacher and the
    reference live may change.
    """
    content = {name: value for name, value in plain(config).items() if name not in NOT_OF_THE_RESULT | {"cluster"}}
    content["megatron"] = {name: value for name, value in content["megatron"].items() if name not in LAYOUT}
    content["reference"].pop("placement")
    teachers = {"teacher": content.pop("teacher"), **content.pop("teachers")}
    content["teachers"] = {name: {key: teacher[key] for key in WHO_TEACHES} for name, teacher in teachers.items()}
    return _digest(content)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def write_record(directory: Path, config: Config, status: RunStatus, error: BaseException | None = None) -> None:
    """Writes `run.json`."""
    said = None if error is None else f"{type(error).__name__}: {error}".splitlines()[0].strip()
    hashes = {"config_hash": config_hash(config), "resume_hash": resume_hash(config)}
    record = {**hashes, "status": status, "error": said}
    write_atomically(directory / RUN_FILE, json.dumps(record) + "\n")


def read_record(directory: Path) -> RunRecord | None:
    """The run in `directory`, None where there is none."""
    file = directory / RUN_FILE
    try:
        content = json.loads(file.read_text())
        return RunRecord(
            directory=directory,
            config_hash=content["config_hash"],
            resume_hash=content["resume_hash"],
            status=RunStatus(content["status"]),
            error=content.get("error"),
            modified=file.stat().st_mtime,
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keeps other processes from running in `directory`; the lock goes with the process, however it ends.

    Raises:
        UserError: another process is at work there.
    """
    with (directory / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{directory}: another process runs in it: the two would overwrite each other's files. "
                "Wait for it or end it, or set another output_dir"
            ) from error
        yield
