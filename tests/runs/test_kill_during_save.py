"""After a save that was killed, or found the disk full, the run goes on from the checkpoint before it, bit for bit."""

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from opd_trainer.checkpoint import LATEST
from opd_trainer.errors import CheckpointError
from tests.megatron import training
from tests.processes import context
from tests.runs.saving import KILLED_SAVE, STEPS, Trained, Watch, train, train_until_killed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

NUM_OPERATIONS = 36
"""File operations of the save that is killed; a test below counts them."""
POINTS = (2, 5, 6, 7, 9, 13, 22, 27, 28, 30, 31, 33, 34, NUM_OPERATIONS)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.write_model(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def operations() -> list[str]:
    """The file operations of the save, filled in by `uninterrupted`."""
    return []


@pytest.fixture(scope="module")
def uninterrupted(student: Path, operations: list[str], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    watch = Watch(tmp_path_factory.mktemp("whole"))
    sys.addaudithook(watch)
    trained = asyncio.run(train(student, watch.folder, watch))
    operations.extend(watch.operations)
    return trained


def resume(student: Path, folder: Path, uninterrupted: Trained) -> int:
    """Goes on; the step that it went on from."""
    resumed = asyncio.run(train(student, folder))
    assert resumed.numbers == uninterrupted.numbers[resumed.resumed_from :]
    assert sorted(path.name for path in folder.iterdir()) == [f"iter_{STEPS:07d}", LATEST]
    return resumed.resumed_from


@pytest.mark.parametrize("point", POINTS)
def test_killed_right_before_a_file_operation(
    student: Path, uninterrupted: Trained, operations: list[str], tmp_path: Path, point: int
) -> None:
    folder = tmp_path / "checkpoints"
    kill(student, folder, point)
    found = resume(student, folder, uninterrupted)
    marked = next(number for number, name in enumerate(operations, 1) if name == f"os.rename .{LATEST}.partial")
    assert found == (KILLED_SAVE if point > marked else KILLED_SAVE - 1)
    print(f"killed before {point:2} {operations[point - 1]:50} resumed from step {found}, same numbers")


def kill(student: Path, folder: Path, point: int, *, background: bool = False) -> None:
    """Trains in a process that kills itself."""
    process = context().Process(target=train_until_killed, args=(student, folder, point, background))
    process.start()
    process.join(900)
    assert process.exitcode == -signal.SIGKILL


def test_saving_in_the_background_changes_no_number(student: Path, uninterrupted: Trained, tmp_path: Path) -> None:
    trained = asyncio.run(train(student, tmp_path / "checkpoints", background=True))
    assert trained == uninterrupted


@pytest.mark.parametrize("point", [6, 20])
def test_killed_in_the_background(student: Path, uninterrupted: Trained, tmp_path: Path, point: int) -> None:
    folder = tmp_path / "checkpoints"
    kill(student, folder, point, background=True)
    assert KILLED_SAVE - 2 <= resume(student, folder, uninterrupted) <= KILLED_SAVE


def test_the_points_cover_the_whole_save(uninterrupted: Trained, operations: list[str]) -> None:
    assert uninterrupted.resumed_from == 0
    assert len(operations) == NUM_OPERATIONS, "\n".join(operations)
    last = f".partial_iter_{KILLED_SAVE - 1:07d}"
    assert operations[-1] == f"os.rmdir {last}"


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes in memory."""
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size}".encode()) != 0:
        pytest.skip(f"cannot mount a file system: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.umount2(bytes(folder), 2)


def test_a_full_disk_ends_the_run_and_keeps_the_previous_checkpoint(
    student: Path, uninterrupted: Trained, tmp_path: Path
) -> None:
    whole = 450_000  # bytes of a checkpoint
    disk = tmp_path / "disk"
    with small_disk(disk, whole * 3 // 2):
        with pytest.raises(CheckpointError, match=r"could not be written .*bytes free"):
            asyncio.run(train(student, disk / "checkpoints"))
        assert (disk / "checkpoints" / LATEST).read_text() == "1"
        libc = ctypes.CDLL(None)
        assert libc.mount(b"tmpfs", bytes(disk), b"tmpfs", 32, f"size={4 * whole}".encode()) == 0  # MS_REMOUNT
        assert resume(student, disk / "checkpoints", uninterrupted) == 1
