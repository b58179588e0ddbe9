"""Tiny models for tests: architectures, Hugging Face twins, and packed micro-batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opd_trainer.megatron.attention import Packed
from opd_trainer.megatron.build import MegatronModel, build_model
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.families.base import Architecture
from opd_trainer.megatron.families.registry import architecture_from_config, to_hf_config
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.model.config import ArchitectureConfig, Family, ModelConfig

VOCAB_SIZE = 53
LENGTHS = (7, 1, 19, 12, 3)


def tiny(family: Family, **changes: Any) -> Architecture:
    shape = ArchitectureConfig(
        family=family, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=48
    )
    return replace(architecture_from_config(shape, VOCAB_SIZE), **changes)


def hf_model(architecture: Architecture, seed: int = 0) -> Any:
    """A random transformers model; every parameter is drawn, also norms and biases, so that none can hide."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = to_hf_config(architecture)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.3 * noise)
    return model.eval()


def pack(sequences: Sequence[torch.Tensor], select: torch.Tensor | None = None) -> Packed:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    total = int(lengths.sum())
    return Packed(
        tokens=torch.cat(list(sequences)),
        position_ids=torch.cat([torch.arange(length) for length in lengths.tolist()]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32),
        max_length=int(lengths.max()),
        select=torch.arange(total) if select is None else select,
    )


def sequences(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


@contextmanager
def started(folder: Path, settings: MegatronConfig | None = None, seed: int = 0) -> Iterator[MegatronRuntime]:
    runtime = MegatronRuntime(0, 1, (folder / "rendezvous").as_uri(), settings or MegatronConfig(), seed)
    runtime.start()
    try:
        yield runtime
    finally:
        runtime.close()


def build(runtime: MegatronRuntime, architecture: Architecture, *, trainable: bool = True) -> MegatronModel:
    return build_model(runtime, architecture, ModelConfig(), runtime.settings, trainable=trainable)
