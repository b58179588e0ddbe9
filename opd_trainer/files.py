"""Files and folders that a crash cannot leave half written."""

import os
import shutil
from pathlib import Path

from opd_trainer.errors import CheckpointError


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by `text`, durably: a reader, and a crash, see either the old or the new content."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync(path.parent)


def publish(partial: Path, folder: Path) -> None:
    """Gives a complete folder its name, durably: after a crash `folder` is complete or not there.

    Args:
        partial: beside `folder`, on the same file system.
        folder: does not exist.
    """
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    partial.rename(folder)
    _sync(folder.parent)


def unwritable(folder: Path, error: BaseException) -> CheckpointError:
    """What to tell when files could not be written below a folder."""
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return CheckpointError(
        f"{folder}: could not be written ({reason[-1].strip()}), with {free:,} bytes free there: what was complete "
        f"before is intact. Make room and continue with resume=auto, or write elsewhere with output_dir=DIR"
    )


def _sync(path: Path) -> None:
    """Waits until a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
