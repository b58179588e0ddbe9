"""The peak memory of a command, from outside: its processes' resident sets, added up while it runs."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Watched:
    """A command that has ended well.

    Attributes:
        peak_gib: largest sum of resident sets of the command and all its descendants, seen every tenth of a second.
        seconds: from its launch to its end.
    """

    peak_gib: float
    seconds: float


def resident_bytes(root: psutil.Process) -> int:
    """Resident sets of a process and its descendants, added up; pages that they share count for each."""
    total = 0
    for process in (root, *root.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            # It ended meanwhile.
            continue
    return total


def watch(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Watched:
    """Runs a command to its end, its output in `log`.

    Raises:
        SystemExit: it failed; the message names `log`.
    """
    began, peak = time.perf_counter(), 0
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=cwd)
        root = psutil.Process(process.pid)
        try:
            while process.poll() is None:
                try:
                    peak = max(peak, resident_bytes(root))
                except psutil.NoSuchProcess:
                    break
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with exit code {process.returncode}; see {log}")
    return Watched(peak / 2**30, time.perf_counter() - began)
