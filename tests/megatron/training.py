"""A tiny student on disk, batches for it, and workers, for tests of training."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opd_trainer import jagged
from opd_trainer.cluster.rendezvous import local_rendezvous
from opd_trainer.demo.arithmetic import save_tokenizer
from opd_trainer.megatron.build import build_model
from opd_trainer.megatron.config import MegatronConfig, OptimizerConfig
from opd_trainer.megatron.families.registry import architecture_from_config
from opd_trainer.megatron.huggingface import save_hf_folder
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.megatron.spec import WorkerSpec
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.model.config import ArchitectureConfig, ModelConfig
from opd_trainer.model.folder import load_tokenizer
from opd_trainer.types import Scores, TokenBatch
from opd_trainer.updates import Live, Wants

SHAPE = ArchitectureConfig(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=48, max_length=64
)
PROMPTS = (3, 2, 5, 1, 4, 2)
RESPONSES = (6, 0, 9, 4, 1, 12)


@dataclass(frozen=True, slots=True)
class WeightedNll:
    """-advantage * log_probs, so that every token counts differently."""

    wants: Wants = field(default_factory=Wants)

    def __call__(self, live: Live, batch: TokenBatch) -> torch.Tensor:
        assert batch.advantage is not None
        return torch.where(batch.mask, -batch.advantage * live.log_probs, 0.0)


@dataclass(frozen=True, slots=True)
class Distill:
    """The OPD surrogate: pulls the live log-probs to the teacher's."""

    wants: Wants = field(default_factory=Wants)

    def __call__(self, live: Live, batch: TokenBatch) -> torch.Tensor:
        assert batch.teacher is not None
        gap = (live.log_probs - batch.teacher.log_probs).detach()
        return torch.where(batch.mask, torch.where(batch.mask, gap, 0.0) * live.log_probs, 0.0)


@dataclass(frozen=True, slots=True)
class Infinite:
    """A loss that is not finite."""

    wants: Wants = field(default_factory=Wants)

    def __call__(self, live: Live, batch: TokenBatch) -> torch.Tensor:
        return torch.where(batch.mask, live.log_probs * torch.inf, 0.0)


def write_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder with random weights and the demo's tokenizer."""
    save_tokenizer(folder)
    shape = dataclasses.replace(SHAPE, **changes)
    settings = MegatronConfig()
    runtime = MegatronRuntime(0, 1, local_rendezvous(), settings, seed)
    runtime.start()
    try:
        architecture = architecture_from_config(shape, len(load_tokenizer(folder)))
        save_hf_folder(build_model(runtime, architecture, ModelConfig(), settings, trainable=False), folder, folder)
    finally:
        runtime.close()
    return folder


def batch(prompts: Sequence[int] = PROMPTS, responses: Sequence[int] = RESPONSES, seed: int = 1) -> TokenBatch:
    """Random sequences; response tokens are unmasked, with random advantages and weights. Masked ones hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([p + r for p, r in zip(prompts, responses, strict=True)], dtype=torch.int64)
    seq, positions = jagged.seq_from_lengths(lengths), jagged.positions(lengths)
    mask = positions >= torch.tensor(prompts, dtype=torch.int64)[seq]
    total, count = int(lengths.sum()), len(lengths)
    advantage = torch.randn(total, generator=generator)
    return TokenBatch(
        tokens=torch.randint(0, 20, (total,), generator=generator),
        seq=seq,
        mask=mask,
        group=torch.arange(count),
        reward=torch.zeros(count),
        truncated=torch.zeros(count, dtype=torch.bool),
        teacher_name=("default",) * count,
        rollout=Scores(log_probs=torch.full((total,), torch.nan), temperature=1.0, model="rollout"),
        version=torch.zeros(count, dtype=torch.int64),
        advantage=torch.where(mask, advantage, torch.nan),
        weight=torch.where(mask, torch.rand(total, generator=generator) / max(1, int(mask.sum())), 0.0),
    )


def spec(folder: Path, **changes: Any) -> WorkerSpec:
    """A student from `folder`; keys of the optimizer and of Megatron may be given beside those of the spec."""

    def take(cls: type) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(cls)}
        return {key: changes.pop(key) for key in list(changes) if key in names}

    optimizer = OptimizerConfig(**{"lr": 1e-2, **take(OptimizerConfig)})
    megatron = MegatronConfig(**take(MegatronConfig), optimizer=optimizer)
    values: dict[str, Any] = {"temperature": 1.0, "seed": 0, "total_steps": 10, "vocab_size": None, **changes}
    return WorkerSpec(model=values.pop("model", ModelConfig(load=str(folder))), megatron=megatron, **values)


@contextmanager
def started(worker_spec: WorkerSpec) -> Iterator[MegatronWorker]:
    """A worker alone in this process."""
    worker = MegatronWorker(worker_spec, 0, 1, local_rendezvous())
    try:
        worker.start()
        yield worker
    finally:
        worker.close()


def weights(worker: MegatronWorker) -> dict[str, torch.Tensor]:
    """Copies of the worker's weights under their Hugging Face names."""
    worker.start_export(1 << 40, "student")
    return {name: tensor.clone() for name, tensor in worker.next_bucket() or []}


def gradient(worker: MegatronWorker) -> torch.Tensor:
    """The gradients of the last update, before clipping was off."""
    assert worker._forward_backward is not None
    return torch.cat([p.main_grad.flatten() for chunk in worker._forward_backward.chunks for p in chunk.parameters()])
