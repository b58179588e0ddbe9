"""Runs a function in several processes that meet over gloo, for tests of everything parallel."""

import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.processes import context


def run_gloo(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
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
            values = _collect(results, world_size, timeout_s)
            for process in processes:
                process.join(timeout=10)
            return values
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(results: Any, world_size: int, timeout_s: float) -> list[Any]:
    values: list[Any] = [None] * world_size
    for _ in range(world_size):
        rank, value, error = results.get(timeout=timeout_s)
        if error is not None:
            raise AssertionError(f"rank {rank} failed:\n{error}")
        values[rank] = value
    return values


def _call(results: Any, function: Callable[..., Any], rank: int, *rest: Any) -> None:
    *join, args = rest
    torch.set_num_threads(1)
    try:
        results.put((rank, function(rank, *join, *args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
