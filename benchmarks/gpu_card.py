"""The card: how fast it multiplies and copies at best, and how a piece of work on it is timed."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from opd_trainer.tracking.provenance import git_state, package_versions


@dataclass(frozen=True)
class Card:
    """Where to measure.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        tiny: shapes that a CPU computes in a moment; its figures mean nothing.
    """

    device: torch.device
    tiny: bool

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], Any], *, rounds: int = 5, warm_up: int = 2) -> float:
        """Median wall seconds of a call, everything that it asked of the device included."""
        taken = []
        for number in range(warm_up + (1 if self.tiny else rounds)):
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            if number >= warm_up:
                taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """Most bytes allocated at once during a call beyond those before; 0 on a CPU."""
        if not self.gpu:
            run()
            return 0
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def forget(self) -> None:
        """Gives cached memory back."""
        if self.gpu:
            torch.cuda.empty_cache()


def ceilings(card: Card) -> dict[str, float]:
    """FLOP/s of a large product in bf16 and in fp32 as torch multiplies by default, bytes/s of a copy."""
    size, count = (64, 1 << 16) if card.tiny else (8192, 1 << 30)

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(size, size, device=card.device, dtype=dtype) for _ in range(2))
        return 2 * size**3 / card.seconds(lambda: a @ b, rounds=10)

    source = torch.randint(0, 255, (count,), device=card.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return {
        "bf16_flop_per_s": product(torch.bfloat16),
        "fp32_flop_per_s": product(torch.float32),
        "copy_bytes_per_s": 2 * count / card.seconds(lambda: target.copy_(source), rounds=10),
    }


def about(card: Card) -> dict[str, Any]:
    """What was measured, on what, and when."""
    git = git_state(Path(__file__))
    found: dict[str, Any] = {"torch": torch.__version__, "device": str(card.device)}
    found |= {"date": datetime.now(UTC).date().isoformat(), "commit": None if git is None else git["commit"]}
    found["versions"] = package_versions()
    if card.gpu:
        properties = torch.cuda.get_device_properties(card.device)
        found |= {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, "capability": f"{properties.major}.{properties.minor}"}
    return found
