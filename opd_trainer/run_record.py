"""What a run directory says about its run: `run.json` with the configuration's hash and the status."""

import dataclasses
import hashlib
import json
from enum import StrEnum, auto
from pathlib import Path
from typing import Any

from opd_trainer.config import Config
from opd_trainer.files import write_atomically

RUN_FILE = "run.json"

NOT_OF_THE_RESULT = frozenset({"name", "output_dir", "resume", "checkpoint", "tracking"})
"""Keys that change where and how often things are written, not what is computed."""


class RunStatus(StrEnum):
    """How far a run has come."""

    running = auto()
    """At work, or killed without a chance to say so."""
    finished = auto()
    """All steps are done."""
    failed = auto()
    """Ended by an exception."""


def plain(value: Any) -> Any:
    """A configuration as dictionaries, lists and scalars; each dataclass names itself as "schema"."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"schema": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def config_hash(config: Config) -> str:
    """16 hex digits; equal for two configurations that compute the same thing."""
    relevant = {name: value for name, value in plain(config).items() if name not in NOT_OF_THE_RESULT}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def write_record(directory: Path, config: Config, status: RunStatus) -> None:
    """Writes `run.json`."""
    record = {"config_hash": config_hash(config), "status": status}
    write_atomically(directory / RUN_FILE, json.dumps(record) + "\n")
