"""Where the time of an update with a resident teacher goes: kernels, operations, and what waits for the device."""

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_card import Card
from benchmarks.gpu_update import Beside, parts_of, spec_of, started
from tests.megatron import training

TOP = 15
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpyAsync", "cudaMalloc", "cudaFree")


def profiled(card: Card, folder: Path) -> list[dict[str, Any]]:
    """Totals and the costliest entries of the teacher's scores alone, and of a whole update."""
    spec = spec_of(card, folder, "qwen3_0_6b")
    parts = parts_of(spec, card)
    found: list[dict[str, Any]] = []
    with started(dataclasses.replace(spec, teachers={"default": Beside(spec.model, spec.megatron)})) as worker:
        ways: dict[str, Callable[[], Any]] = {
            "teacher": lambda: worker.score(parts, "teacher"),
            "update": lambda: worker.update(parts, training.Distill()),
        }
        for of, run in ways.items():
            for _ in range(3):
                run()
            found += [{"of": of, **row} for row in (_totals(card, run), *_costliest(card, run))]
    card.forget()
    return found


def _totals(card: Card, run: Callable[[], Any]) -> dict[str, Any]:
    """Without the profiler, which slows the host down: seconds, those of garbage collection, blocks got from CUDA."""
    allocated = _device_allocations(card)
    with _collections() as collected:
        taken = card.seconds(run, rounds=3, warm_up=0)
    blocks = _device_allocations(card) - allocated
    return {"by": "total", "s": taken, "collections": len(collected), "collections_s": sum(collected), "blocks": blocks}


def _device_allocations(card: Card) -> int:
    return torch.cuda.memory_stats(card.device)["num_device_alloc"] if card.gpu else 0


@contextlib.contextmanager
def _collections() -> Iterator[list[float]]:
    """Seconds of each garbage collection inside."""
    taken: list[float] = []
    began = 0.0

    def note(phase: str, _info: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.perf_counter()
        else:
            taken.append(time.perf_counter() - began)

    gc.callbacks.append(note)
    try:
        yield taken
    finally:
        gc.callbacks.remove(note)


def _costliest(card: Card, run: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """Sums over one call, what waits for the device, and the entries that take most of the device and of the host."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card.gpu else [])]
    with profile(activities=activities) as recorded:
        run()
        card.wait()
    events: Any = recorded.key_averages()
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    host = [event for event in events if event.device_type == DeviceType.CPU]
    yield {
        "by": "sum",
        "kernels": sum(event.count for event in kernels),
        "device_ms": sum(event.self_device_time_total for event in kernels) / 1e3,
        "operations": sum(event.count for event in host),
        "host_ms": sum(event.self_cpu_time_total for event in host) / 1e3,
    }
    for event in host:
        if event.key in WAITS or "LaunchKernel" in event.key:
            yield _row("runtime", event, event.self_cpu_time_total)
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:TOP]:
        yield _row("device", event, event.self_device_time_total)
    for event in sorted(host, key=lambda event: -event.self_cpu_time_total)[:TOP]:
        yield _row("host", event, event.self_cpu_time_total)


def _row(by: str, event: Any, microseconds: float) -> dict[str, Any]:
    return {"by": by, "name": event.key[:90], "calls": event.count, "ms": microseconds / 1e3}
