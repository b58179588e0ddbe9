"""Which run directory a command means: a new one, the one that the user names, or an unfinished one to continue."""

import os
from pathlib import Path

from opd_trainer.errors import Problem
from opd_trainer.model.folder import CHECKPOINTS
from opd_trainer.run_record import RUN_FILE, RunStatus, read_record
from opd_trainer.tracking.files import METRICS, SUMMARY

RESULTS = (METRICS, SUMMARY, "eval_*", f"{CHECKPOINTS}/*")
"""What a run has to show for its time: steps, evaluations, checkpoints."""


def unfinished(parent: Path, wanted: str) -> Path | None:
    """The latest unfinished run directly under `parent` that a configuration of resume hash `wanted` continues."""
    runs = (read_record(file.parent) for file in parent.glob(f"*/{RUN_FILE}"))
    mine = [run for run in runs if run is not None and run.resume_hash == wanted and run.status != RunStatus.finished]
    return max(mine, key=lambda run: run.modified).directory if mine else None


def has_results(directory: Path) -> bool:
    """Whether a run in `directory` measured or saved anything."""
    return any(path.stat().st_size for pattern in RESULTS for path in directory.glob(pattern))


def unmakable(directory: Path) -> Problem | None:
    """Why nothing can be written into `directory`, which need not exist."""
    there = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    if there.is_dir() and os.access(there, os.W_OK):
        return None
    why = f"nothing can be written into {there.absolute()}" if there.is_dir() else f"{there} is a file"
    return Problem("output_dir", str(directory), why, "Set output_dir to a folder, or to one that can be made")


def named_directory_problem(directory: Path, wanted: str, continues: bool) -> Problem | None:
    """Why a run of resume hash `wanted` cannot use `directory`: it cannot be made, or another one is there already."""
    refused = unmakable(directory)
    if refused is not None:
        return refused
    run = read_record(directory)
    # A run that is at work elsewhere may have nothing to show yet; one that ended like that has nothing to lose.
    if run is None or (run.status != RunStatus.running and not has_results(directory)):
        return None
    there = f"{directory} holds a {'finished' if run.status == RunStatus.finished else 'started'} run"
    if not continues:
        return Problem(
            "output_dir",
            there,
            "a second run would mix its files with it",
            "Set resume=auto to continue it, or another output_dir",
        )
    if run.resume_hash != wanted:
        return Problem(
            "output_dir",
            there,
            "its settings differ from this command's",
            f"Repeat its settings ({directory / 'config.yaml'}), or set another output_dir",
        )
    if run.status == RunStatus.finished:
        return Problem("output_dir", there, "there is nothing to continue", "Set another output_dir")
    return None
