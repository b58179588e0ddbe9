"""Which code a run ran: commit and versions."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from opd_trainer import __version__

PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "sglang",
    "ray",
    "hydra-core",
    "numpy",
)
FROZEN_GIT = "git.json"
"""Beside a copy of the package that was made for a job: what git said where it was copied."""


def package_versions() -> dict[str, str]:
    """Versions of Python and of those of `PACKAGES` that are installed."""
    versions = {"python": platform.python_version(), "opd_trainer": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def git_state(file: Path = Path(__file__)) -> dict[str, Any] | None:
    """`{"commit": sha, "dirty": bool}` of the checkout that tracks `file`; None when there is none (or no git).

    A copy that was made for a job has that of its original.
    """
    frozen = Path(__file__).parents[2] / FROZEN_GIT
    if file == Path(__file__) and frozen.is_file():
        return json.loads(frozen.read_text(encoding="utf-8"))
    try:
        _git(file, "ls-files", "--error-unmatch", file.name)
        commit = _git(file, "rev-parse", "HEAD")
        dirty = bool(_git(file, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": dirty}


def _git(file: Path, *arguments: str) -> str:
    command = ["git", "-C", str(file.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
