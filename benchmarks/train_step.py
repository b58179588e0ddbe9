"""What an update costs: against a bare loop, with a teacher, with two processes, by sequence length and vocabulary.

Run: python -m benchmarks.train_step [--json FILE]

Ratios within one process are of CPU time and of medians of alternating rounds, so that a busy machine hardly moves
them. Tokens per second are of CPU time, too; two processes are compared with one in wall time, which it does move.
"""

import argparse
import functools
import json
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks.machine import measuring
from opd_trainer.loss.nll import NegativeLogLikelihood
from opd_trainer.megatron.micro_batch import Scoring, prepare
from opd_trainer.megatron.packing import plan
from opd_trainer.megatron.source import load_model
from opd_trainer.megatron.spec import WorkerSpec
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.model.config import ArchitectureConfig, ModelConfig
from opd_trainer.teacher.config import ResidentTeacher
from opd_trainer.teacher.inline import inline_teacher
from opd_trainer.types import TokenBatch
from tests.gloo import run_gloo
from tests.megatron import training

BUDGET = 8192
PROMPT = 10
LOSS = NegativeLogLikelihood()


def student(folder: Path, **changes: Any) -> WorkerSpec:
    """The demo's shape, from scratch."""
    training.save_tokenizer(folder)
    vocab_size = changes.pop("vocab_size", 22)
    shape: dict[str, Any] = {"max_length": 2048, **changes}
    model = ModelConfig(huggingface=str(folder), architecture=ArchitectureConfig(**shape))
    return training.spec(folder, model=model, vocab_size=vocab_size)


def batch_of(sequences: int, shortest: int, longest: int) -> TokenBatch:
    """Random sequences with equal weights."""
    lengths = torch.randint(shortest, longest, (sequences,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = training.batch((PROMPT,) * sequences, lengths)
    return batch.replace(weight=batch.mask / batch.mask.sum())


def parts_of(batch: TokenBatch, ranks: int = 1, rank: int = 0) -> list[TokenBatch]:
    """The micro-batches of one rank."""
    return [batch.take(part) for part in plan(batch.lengths.tolist(), ranks, BUDGET).ranks[rank]]


def alternate(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each way, in turns, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            if number:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def against_bare_loop(folder: Path, rounds: int) -> dict[str, float]:
    """Our update and a plain PyTorch loop over a twin of the same Megatron model and the same packed tokens."""
    spec, batch = student(folder), batch_of(128, 10, 50)
    parts = parts_of(batch)
    with training.started(spec) as worker:
        runtime = worker._runtime
        # A twin: the hooks of the worker's model move gradients into buffers.
        twin = load_model(runtime, spec.model, spec.megatron, vocab_size=spec.vocab_size, trainable=True).model
        scoring = Scoring(1.0, spec.megatron.log_prob_chunk_tokens)
        prepared = [prepare(part, runtime) for part in parts]
        adam = torch.optim.AdamW(twin.modules[0].parameters(), lr=1e-3)

        def bare() -> None:
            adam.zero_grad()
            for part, micro_batch in zip(parts, prepared, strict=True):
                log_probs, _ = scoring(twin, twin.forward(micro_batch.packed), micro_batch.targets)
                assert part.weight is not None
                (-log_probs * part.weight[micro_batch.index]).sum().backward()
            clip_grad_norm_(twin.modules[0].parameters(), 1.0)
            adam.step()

        seconds = alternate({"bare": bare, "update": lambda: worker.update(parts, LOSS)}, rounds)
    return {
        "tokens": batch.num_tokens,
        "update_tokens_per_s": batch.num_tokens / seconds["update"],
        "bare_tokens_per_s": batch.num_tokens / seconds["bare"],
        "speed_of_bare_loop": seconds["bare"] / seconds["update"],
    }


def with_teacher(folder: Path, rounds: int) -> dict[str, float]:
    """An update that asks an equal-size resident teacher, against the same update whose scores are known already."""
    shape = {"hidden_size": 128, "num_layers": 4, "head_dim": 32, "intermediate_size": 384, "max_length": 512}
    names = ("student", "teacher")
    models = [training.write_model(folder / name, seed=seed, **shape) for seed, name in enumerate(names)]
    plain = training.spec(models[0])
    teacher = ResidentTeacher(load=str(models[1]))
    resident = inline_teacher("default", teacher, plain.model, plain.megatron, 1.0)
    batch = batch_of(128, 10, 50)
    unknown = parts_of(batch)
    with training.started(training.spec(models[0], teachers={"default": resident})) as worker:
        scored = worker.score(unknown, "teacher")
        known = [
            part.replace(teacher=training.Scores(log_probs=scores, temperature=1.0, model="teacher"))
            for part, scores in zip(unknown, scored, strict=True)
        ]
        loss = training.Distill()
        ways = {"on": lambda: worker.update(unknown, loss), "off": lambda: worker.update(known, loss)}
        seconds = alternate(ways, rounds)
    return {"on_s": seconds["on"], "off_s": seconds["off"], "cost_of_teacher": seconds["on"] / seconds["off"]}


def parallel_rank(rank: int, size: int, rendezvous: str, folder: Path, rounds: int) -> bytes:
    """Wall seconds of updates on this rank's share of the batch."""
    parts = parts_of(batch_of(64, 50, 200), size, rank)
    worker = MegatronWorker(student(folder / str(rank)), rank, size, rendezvous)
    worker.start()
    try:
        seconds = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            worker.update(parts, LOSS)
            seconds.append(time.perf_counter() - began)
    finally:
        worker.close()
    return pickle.dumps(seconds[1:])


def two_processes(folder: Path, rounds: int) -> dict[str, float]:
    """The same batch on one process and, cut in two, on two; the slower rank counts, and the best round."""
    best = {}
    for size in (1, 2):
        ranks = [pickle.loads(r) for r in run_gloo(parallel_rank, size, folder / f"dp{size}", rounds)]
        best[size] = min(max(both) for both in zip(*ranks, strict=True))
    return {"one_s": best[1], "two_s": best[2], "speedup": best[1] / best[2], "load_average": os.getloadavg()[0]}


def packing() -> list[dict[str, float]]:
    """Packing of responses as long as those of reasoning models: log-normal, median 900, up to 8192 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(512, generator=generator) * 0.9 + 6.8).exp().clamp(32, BUDGET).long().tolist()
    found = []
    for ranks in (1, 2, 4, 8):
        planned = plan(lengths, ranks, BUDGET)
        fill = sum(lengths) / (BUDGET * planned.num_micro_batches * ranks)
        found.append({"ranks": ranks, "efficiency": planned.efficiency, "fill": fill})
    return found


def tokens_per_s(spec: WorkerSpec, batch: TokenBatch, rounds: int) -> float:
    parts = parts_of(batch)
    with training.started(spec) as worker:
        seconds = alternate({"update": lambda: worker.update(parts, LOSS)}, rounds)
    return batch.num_tokens / seconds["update"]


def by_length(folder: Path, rounds: int) -> list[dict[str, float]]:
    """About 2048 tokens in sequences of one length."""
    spec = student(folder)
    return [
        {
            "length": length,
            "tokens_per_s": tokens_per_s(spec, batch_of(2048 // length, length - PROMPT, length - PROMPT + 1), rounds),
        }
        for length in (64, 256, 1024)
    ]


def by_vocabulary(folder: Path, rounds: int) -> list[dict[str, float]]:
    """About 512 tokens of a small model, whose output head is all that grows."""
    shape = {"hidden_size": 64, "num_layers": 2, "head_dim": 16, "intermediate_size": 192}
    return [
        {
            "vocab_size": size,
            "tokens_per_s": tokens_per_s(student(folder, **shape, vocab_size=size), batch_of(8, 54, 55), rounds),
        }
        for size in (1024, 16384, 151_936)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    write = measuring()
    torch.set_num_threads(1)
    rounds, few = arguments.rounds, max(2, arguments.rounds // 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[], Any]] = {
            "bare_loop": functools.partial(against_bare_loop, folder / "bare", rounds),
            "teacher": functools.partial(with_teacher, folder / "teacher", rounds),
            "packing": packing,
            "sequence_length": functools.partial(by_length, folder / "length", few),
            "vocabulary": functools.partial(by_vocabulary, folder / "vocabulary", few),
            "two_processes": functools.partial(two_processes, folder, rounds),
        }
        found: dict[str, Any] = {}
        for title, part in parts.items():
            found[title] = part()
            print(f"{title}: {json.dumps(found[title])}", flush=True)
    if arguments.json:
        write(arguments.json, found)


if __name__ == "__main__":
    main()
