"""Which run directory a command means: a new one, the one that the user names, or an unfinished one to continue."""

from pathlib import Path

from opd_trainer.errors import Problem
from opd_trainer.run_record import RUN_FILE, RunStatus, read_record


def unfinished(parent: Path, wanted: str) -> Path | None:
    """The latest unfinished run directly under `parent` that a configuration of resume hash `wanted` continues."""
    runs = (read_record(file.parent) for file in parent.glob(f"*/{RUN_FILE}"))
    mine = [run for run in runs if run is not None and run.resume_hash == wanted and run.status != RunStatus.finished]
    return max(mine, key=lambda run: run.modified).directory if mine else None


def named_directory_problem(directory: Path, wanted: str, continues: bool) -> Problem | None:
    """Why a run of resume hash `wanted` cannot use `directory`: another one is there already."""
    run = read_record(directory)
    if run is None:
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
