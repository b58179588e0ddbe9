"""Peak memory of log-probs with their gradient, against log-softmax in fp32, at the size of a real vocabulary.

Run: python -m benchmarks.log_prob_memory [--json FILE]
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import measuring
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.log_probs import token_log_probs


@dataclass(frozen=True)
class Peaks:
    """Bytes beyond the logits themselves, and seconds."""

    tokens: int
    vocab_size: int
    chunk_tokens: int
    ours_forward: int
    naive_forward: int
    ours: int
    naive: int
    ours_s: float
    naive_s: float

    @property
    def forward_ratio(self) -> float:
        """Ours / naive, without gradient."""
        return self.ours_forward / self.naive_forward

    @property
    def ratio(self) -> float:
        """Ours / naive, forward and backward."""
        return self.ours / self.naive


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that torch had allocated at once during `run`, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results: Any = profiler.profiler
    now = most = 0
    for event in sorted(results.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measure(tokens: int, vocab_size: int, chunk_tokens: int) -> Peaks:
    """Both ways on the same bf16 logits."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    logits = torch.empty(tokens, vocab_size, dtype=torch.bfloat16).uniform_(-4, 4, generator=generator)

    def ours(wanted: Tensor) -> Tensor:
        return token_log_probs(wanted, targets, temperature=1.0, vocab_size=vocab_size, chunk_tokens=chunk_tokens)[0]

    def naive(wanted: Tensor) -> Tensor:
        return wanted.float().log_softmax(1).gather(1, targets[:, None])[:, 0]

    def forward(log_probs: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                log_probs(logits)

        return run

    def both(log_probs: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            leaf = logits.detach().requires_grad_()
            log_probs(leaf).sum().backward()

        return run

    times, peaks = [], []
    for way in (ours, naive):
        peaks.append(peak_bytes(forward(way)))
        began = time.process_time()
        peaks.append(peak_bytes(both(way)))
        times.append(time.process_time() - began)
    return Peaks(tokens, vocab_size, chunk_tokens, peaks[0], peaks[2], peaks[1], peaks[3], *times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--chunk-tokens", type=int, nargs="+", default=[MegatronConfig().log_prob_chunk_tokens])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    write = measuring()
    torch.set_num_threads(1)
    found = [measure(arguments.tokens, arguments.vocab_size, chunk) for chunk in arguments.chunk_tokens]
    for peaks in found:
        print(
            f"{peaks.tokens} tokens, vocabulary {peaks.vocab_size}, chunks of {peaks.chunk_tokens}: forward "
            f"{peaks.ours_forward / 2**30:.3f} of {peaks.naive_forward / 2**30:.3f} GiB ({peaks.forward_ratio:.1%}), "
            f"with gradient {peaks.ours / 2**30:.3f} of {peaks.naive / 2**30:.3f} GiB ({peaks.ratio:.1%}); "
            f"{peaks.ours_s:.1f} of {peaks.naive_s:.1f} s"
        )
    if arguments.json:
        rows = [asdict(p) | {"forward_ratio": p.forward_ratio, "ratio": p.ratio} for p in found]
        write(arguments.json, rows)


if __name__ == "__main__":
    main()
