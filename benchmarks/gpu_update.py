"""Updates of models in the shape of Qwen3 on a GPU: our worker's against a bare loop, with a teacher, by divergence."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks.gpu_card import Card
from opd_trainer import jagged
from opd_trainer.cluster.rendezvous import local_rendezvous
from opd_trainer.divergence.config import DivergenceConfig, DivergenceKind
from opd_trainer.divergence.token import TokenDivergence
from opd_trainer.loss.nll import NegativeLogLikelihood
from opd_trainer.megatron import build
from opd_trainer.megatron.build import MegatronModel, build_model
from opd_trainer.megatron.config import MegatronConfig, OptimizerConfig
from opd_trainer.megatron.frozen import ResidentModel
from opd_trainer.megatron.live_weights import LiveWeights
from opd_trainer.megatron.memory import local_size
from opd_trainer.megatron.micro_batch import Scoring, prepare
from opd_trainer.megatron.packing import plan
from opd_trainer.megatron.source import architecture_of, load_model
from opd_trainer.megatron.spec import WorkerSpec
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.model.config import ArchitectureConfig, Dtype, ModelConfig
from opd_trainer.teacher.inline import MegatronTeacher
from opd_trainer.types import ModelIdentity, Scores, TokenBatch
from opd_trainer.updates import Wants
from tests.megatron import training

VOCAB_SIZE = 151_936
SHAPES = {
    "qwen3_0_6b": {"hidden_size": 1024, "num_layers": 28, "num_heads": 16, "intermediate_size": 3072},
    "qwen3_1_7b": {"hidden_size": 2048, "num_layers": 28, "num_heads": 16, "intermediate_size": 6144},
}
TINY = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96, "num_kv_heads": 2, "head_dim": 16}
BUDGETS = {"qwen3_0_6b": 8192, "qwen3_1_7b": 4096}
"""Tokens of a micro-batch: what an 80 GiB card holds beside a teacher, without recomputation."""
SCORING = Scoring(1.0, MegatronConfig().log_prob_chunk_tokens)


@contextlib.contextmanager
def quick_weights() -> Iterator[None]:
    """Draws weights on the device: drawn by name on the CPU they take longer than what is measured."""

    def draw(model: MegatronModel, _seed: int) -> None:
        with torch.no_grad():
            for _, parameter in model.parameters():
                parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=0.02)

    own, build.initialize = build.initialize, draw
    try:
        yield
    finally:
        build.initialize = own


class Beside:
    """A recipe for a resident teacher of the student's shape."""

    def __init__(self, settings: ModelConfig, megatron: MegatronConfig) -> None:
        self._settings, self._megatron = settings, megatron

    def build(self, live: LiveWeights) -> MegatronTeacher:
        shape = live.model.architecture
        model = build_model(live.model.runtime, shape, self._settings, self._megatron, trainable=False)
        identity = ModelIdentity(
            path="random",
            weights="",
            vocabulary="",
            vocab_size=shape.vocab_size,
            eos_token_ids=(),
            chat_template="",
            max_length=shape.max_length,
        )
        return MegatronTeacher(ResidentModel(model, SCORING), identity)


def shape_of(card: Card, name: str) -> ArchitectureConfig:
    sizes: dict[str, Any] = TINY if card.tiny else {**SHAPES[name], "num_kv_heads": 8, "head_dim": 128}
    return ArchitectureConfig(**sizes, max_length=4096, rope_theta=1e6)


def spec_of(card: Card, folder: Path, name: str) -> WorkerSpec:
    """A student of this shape with random weights in bf16."""
    training.save_tokenizer(folder)
    model = ModelConfig(huggingface=str(folder), architecture=shape_of(card, name), dtype=Dtype.bfloat16)
    budget = 256 if card.tiny else BUDGETS[name]
    megatron = MegatronConfig(max_tokens_per_device=budget, optimizer=OptimizerConfig(lr=1e-6))
    vocab_size = 97 if card.tiny else VOCAB_SIZE
    return WorkerSpec(model=model, megatron=megatron, temperature=1.0, seed=0, total_steps=1000, vocab_size=vocab_size)


def parts_of(spec: WorkerSpec, card: Card) -> list[TokenBatch]:
    """Micro-batches full of random tokens: prompts of an eighth, responses up to a quarter of the budget."""
    budget, generator = spec.megatron.max_tokens_per_device, torch.Generator().manual_seed(0)
    longest = budget // 4
    lengths = torch.randint(longest // 4, longest, (8 if card.tiny else 32,), generator=generator)
    seq, positions = jagged.seq_from_lengths(lengths), jagged.positions(lengths)
    mask, total = positions >= longest // 8, int(lengths.sum())
    batch = training.batch((1,), (1,)).replace(
        tokens=torch.randint(0, spec.vocab_size or 2, (total,), generator=generator),
        seq=seq,
        mask=mask,
        group=torch.arange(len(lengths)),
        reward=torch.zeros(len(lengths)),
        truncated=torch.zeros(len(lengths), dtype=torch.bool),
        teacher_name=("default",) * len(lengths),
        rollout=Scores(log_probs=torch.full((total,), torch.nan), temperature=1.0, model="rollout"),
        version=torch.zeros(len(lengths), dtype=torch.int64),
        advantage=torch.where(mask, 1.0, torch.nan),
        weight=mask / mask.sum(),
    )
    return [batch.take(part) for part in plan(lengths.tolist(), 1, budget).ranks[0]]


@contextlib.contextmanager
def started(spec: WorkerSpec) -> Iterator[MegatronWorker]:
    worker = MegatronWorker(spec, 0, 1, local_rendezvous())
    try:
        with quick_weights():
            worker.start()
        yield worker
    finally:
        worker.close()


def speed(card: Card, name: str, folder: Path, peak_flop_per_s: float) -> dict[str, float]:
    """Updates whose teacher's scores are known, that ask the teacher, and that compare whole distributions."""
    plain = spec_of(card, folder, name)
    parts = parts_of(plain, card)
    tokens = sum(part.num_tokens for part in parts)
    size = local_size(architecture_of(plain.model, plain.vocab_size), plain.megatron)
    beside = Beside(plain.model, plain.megatron)
    with started(dataclasses.replace(plain, teachers={"default": beside})) as worker:
        known = [
            part.replace(teacher=Scores(log_probs=scores, temperature=1.0, model="teacher"))
            for part, scores in zip(parts, worker.score(parts, "teacher"), strict=True)
        ]
        sampled = training.Distill()
        dense = Dense(Wants(divergence=TokenDivergence(DivergenceConfig(kind=DivergenceKind.reverse_kl))))
        ways = {"off": (known, sampled), "on": (parts, sampled), "reverse_kl": (parts, dense)}
        found: dict[str, float] = {"parameters": size.total, "tokens": tokens, "micro_batches": len(parts)}
        seconds, work = {}, {}
        for way, (batches, loss) in ways.items():
            seconds[way] = card.seconds(lambda batches=batches, loss=loss: worker.update(batches, loss), rounds=3)
            told = worker.update(batches, loss)
            found |= {f"{way}_s": seconds[way], f"{way}_tokens_per_s": tokens / seconds[way]}
            found |= {f"{way}_{phase}_s": taken for phase, taken in told.seconds.items()}
            found[f"{way}_peak_gib"] = told.peak_memory_bytes / 2**30
            work[way] = told.flop
    card.forget()
    return {
        **found,
        "teacher_gib": 2 * size.total / 2**30,
        "off_mfu": work["off"] / seconds["off"] / peak_flop_per_s,
        "on_mfu": work["on"] / seconds["on"] / peak_flop_per_s,
        "cost_of_teacher": seconds["on"] / seconds["off"],
        "reverse_kl_to_sampled": seconds["reverse_kl"] / seconds["on"],
    }


class Dense:
    """A divergence of whole distributions as the loss."""

    def __init__(self, wants: Wants) -> None:
        self.wants = wants

    def __call__(self, live: Any, batch: TokenBatch) -> torch.Tensor:
        return torch.where(batch.mask, live.divergence, 0.0)


def against_bare_loop(card: Card, folder: Path) -> dict[str, float]:
    """Our update, and a plain loop over a twin of the same model, the same packed tokens and torch's fused Adam.

    The loop keeps gradients in bf16 and fp32 copies of the weights, as mixed precision is written by hand.
    """
    spec = spec_of(card, folder, "qwen3_0_6b")
    parts = parts_of(spec, card)
    tokens, nll = sum(part.num_tokens for part in parts), NegativeLogLikelihood()
    with started(spec) as worker:
        update = card.seconds(lambda: worker.update(parts, nll), rounds=4, warm_up=2)
        runtime = worker._runtime
        with quick_weights():
            twin = load_model(runtime, spec.model, spec.megatron, vocab_size=spec.vocab_size, trainable=True).model
        weights = list(twin.modules[0].parameters())
        main = [weight.detach().float().requires_grad_() for weight in weights]
        adam = torch.optim.AdamW(main, lr=1e-6, fused=True)

        def bare() -> None:
            for weight in weights:
                weight.grad = None
            for part in parts:
                micro_batch = prepare(part, runtime)
                log_probs, _ = SCORING(twin, twin.forward(micro_batch.packed), micro_batch.targets)
                weight = micro_batch.batch.weight
                assert weight is not None
                (-log_probs * weight[micro_batch.own]).sum().backward()
            for copy, weight in zip(main, weights, strict=True):
                copy.grad = None if weight.grad is None else weight.grad.float()
            clip_grad_norm_(main, 1.0)
            adam.step()
            with torch.no_grad():
                for copy, weight in zip(main, weights, strict=True):
                    weight.copy_(copy)

        loop = card.seconds(bare, rounds=4, warm_up=2)
    card.forget()
    return {
        "update_tokens_per_s": tokens / update,
        "bare_tokens_per_s": tokens / loop,
        "speed_of_bare_loop": loop / update,
    }
