"""Runs a function in several processes that meet over gloo, for tests of everything parallel."""

import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.processes import context

LIMIT_S = 900.0
"""On all that the processes do together; generous, since other work may keep the machine busy."""


def run_gloo(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Calls `function(rank, world_size, rendezvous, *args)` in `world_size` new processes; results by rank.

    `function` is defined at the top of a module. It joins the others itself, through `rendezvous` (a file:// address).
    What it returns and takes has to be picklable; the first exception of a process is raised here, with its traceback.
    """
    new = context()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = (Path(folder) / "rendezvous").as_uri()
        results = new.Queue()
        processes = [
            new.Process(target=_call, args=(results, function, rank, world_size, rendezvous, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            values = _collect(results, processes)
            for process in processes:
                process.join(timeout=10)
            return values
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(results: Any, processes: Sequence[Any]) -> list[Any]:
    values: dict[int, Any] = {}
    deadline = time.monotonic() + LIMIT_S
    while len(values) < len(processes):
        silent = [process for rank, process in enumerate(processes) if rank not in values]
        rank, value, error = _next(results, silent, deadline)
        if error is not None:
            raise AssertionError(f"rank {rank} failed:\n{error}")
        values[rank] = value
    return [values[rank] for rank in range(len(processes))]


def _next(results: Any, silent: Sequence[Any], deadline: float) -> Any:
    """What some process says next; nobody waits for one that died without a word."""
    while True:
        # Looked at first: what a process said before its death can be read afterwards.
        died = [process.exitcode for process in silent if process.exitcode]
        try:
            return results.get(timeout=1.0)
        except queue.Empty:
            assert not died, f"a process ended with exit code {died[0]}, and without a result"
            assert time.monotonic() < deadline, f"no result within {LIMIT_S:g} s"


def _call(results: Any, function: Callable[..., Any], rank: int, *rest: Any) -> None:
    *join, args = rest
    torch.set_num_threads(1)
    try:
        results.put((rank, function(rank, *join, *args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
