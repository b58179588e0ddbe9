import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_trainer.megatron.build import build_model
from opd_trainer.megatron.config import MegatronConfig, Recompute
from opd_trainer.megatron.families.base import Architecture
from opd_trainer.megatron.log_probs import token_log_probs
from opd_trainer.megatron.memory import (
    LocalSize,
    activations,
    gradient_bytes,
    local_size,
    logits_bytes,
    optimizer_bytes,
)
from opd_trainer.megatron.optimizer import Optimizer, wrap
from opd_trainer.model.config import Dtype, Family, ModelConfig
from tests.megatron import models

WIDER = {"hidden_size": 64, "num_heads": 8, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 192, "num_layers": 3}
LENGTHS = (32,) * 8


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("dtype", Dtype)
def test_weights_gradients_and_optimizer_are_what_a_trained_model_has(tmp_path: Path, family: Family, dtype: Dtype):
    layout, architecture = MegatronConfig(), models.tiny(family)
    with models.started(tmp_path, layout) as runtime:
        model = build_model(runtime, architecture, ModelConfig(dtype=dtype), layout, trainable=True)
        chunks = wrap(model.modules, layout)
        optimizer = Optimizer(chunks, layout, 1)
        parameters = list(model.modules[0].parameters())
        optimizer.zero_grad()
        optimizer.step()
        size = local_size(architecture, layout)
        assert size.total == sum(p.numel() for p in parameters)
        assert size.largest == max(p.numel() for p in parameters)
        gradients: list[Any] = [getattr(p, "main_grad") for p in parameters]  # noqa: B009
        assert gradient_bytes(size) == sum(g.nbytes for g in gradients)
        groups = optimizer.megatron.param_groups
        own = {p.data_ptr() for p in parameters}
        main = [p for group in groups for p in group["params"] if p.data_ptr() not in own]
        inner = getattr(optimizer.megatron, "optimizer", None) or optimizer.megatron.chained_optimizers[0].optimizer
        moments = [t for state in inner.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
        measured = sum(t.nbytes for t in (*main, *moments))
        assert optimizer_bytes(size, dtype, layout, 1) == measured


def dense(**changes: Any) -> Architecture:
    """8 wide, 4 layers, 2 query heads and 1 key head of 4, feed-forward 16, 10 words, untied."""
    shape = {"hidden_size": 8, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
    return models.tiny(Family.llama, **shape, intermediate_size=16, vocab_size=10, tie_embeddings=False, **changes)


LAYER = 3 * 8 * 8 + 8 * 8 + 3 * 8 * 16 + 2 * 8
"""q, k, v; output; gate, up, down; two norms."""


def test_hand_counts_of_layouts():
    plain = MegatronConfig()
    assert local_size(dense(), plain).total == 2 * 80 + 4 * LAYER + 8
    halves = MegatronConfig(tensor_parallel=2)
    assert local_size(dense(), halves).total == 80 + 4 * ((LAYER - 16) // 2 + 16) + 8
    uneven = MegatronConfig(pipeline_parallel=2, pipeline_layers=[3, 1])
    assert local_size(dense(), uneven, 0).total == 80 + 3 * LAYER
    assert local_size(dense(), uneven, 1).total == 80 + LAYER + 8
    tied = dataclasses.replace(dense(), tie_embeddings=True)
    assert local_size(tied, plain).total == 80 + 4 * LAYER + 8
    assert local_size(tied, uneven, 1).total == 80 + LAYER + 8, "the last stage has a copy of the embedding"
    assert local_size(dense().with_value_head(), plain).total == 80 + 4 * LAYER + 8 + 8


def test_padding_of_the_vocabulary_is_counted():
    three = dataclasses.replace(dense(), num_heads=3, num_kv_heads=3, intermediate_size=18)
    one, split = (local_size(three, MegatronConfig(tensor_parallel=size)) for size in (1, 3))
    layer = 3 * 12 * 8 + 8 * 12 + 3 * 8 * 18
    assert one.total == 2 * 80 + 4 * (layer + 16) + 8
    assert split.total == 2 * 4 * 8 + 4 * (layer // 3 + 16) + 8, "12 rows for 10 words"


def test_experts_are_shared_by_their_ranks():
    architecture = models.tiny(Family.qwen3_moe)
    whole = local_size(architecture, MegatronConfig())
    half = local_size(architecture, MegatronConfig(expert_parallel=2))
    assert (half.dense, half.experts) == (whole.dense, whole.experts // 2)


def test_optimizer_state_is_spread_over_data_parallel_ranks():
    size, layout = LocalSize(dense=96, experts=32, largest=1), MegatronConfig(distributed_optimizer=True)
    assert optimizer_bytes(size, Dtype.float32, layout, 4) == (24 + 8) * 8
    assert optimizer_bytes(size, Dtype.bfloat16, layout, 4) == (24 + 8) * 12
    split = MegatronConfig(distributed_optimizer=True, tensor_parallel=2, expert_parallel=2)
    assert optimizer_bytes(size, Dtype.float32, split, 4) == (48 + 16) * 8
    assert optimizer_bytes(size, Dtype.float32, MegatronConfig(), 4) == 128 * 8


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize("dtype", Dtype)
def test_activations_are_what_autograd_keeps(tmp_path: Path, family: Family, recompute: Recompute, dtype: Dtype):
    architecture, layout = models.tiny(family, **WIDER), MegatronConfig(recompute=recompute)
    packed = dataclasses.replace(models.pack(models.sequences(LENGTHS)), select=torch.arange(1))
    kept: dict[int, torch.UntypedStorage] = {}
    with models.started(tmp_path, layout) as runtime:
        model = build_model(runtime, architecture, ModelConfig(dtype=dtype), layout, trainable=True)
        weights = {p.untyped_storage().data_ptr() for p in model.modules[0].parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.forward(packed)
    measured = sum(storage.nbytes() for storage in kept.values())
    estimate = activations(architecture, layout, sum(LENGTHS), dtype, short_keys=max(LENGTHS))
    assert measured * 0.95 <= estimate.kept <= measured * 1.2
    assert (estimate.working > 0) == (recompute is not Recompute.none)


def test_pipeline_stages_hold_the_micro_batches_in_flight():
    layout = MegatronConfig(pipeline_parallel=2)
    first, last = (
        activations(dense(), layout, 8, Dtype.float32, stage, short_keys=max(LENGTHS)).peak for stage in (0, 1)
    )
    assert first == 2 * last


@pytest.mark.parametrize("dtype", Dtype)
def test_logits_are_bounded(dtype: Dtype):
    architecture = dataclasses.replace(dense(), vocab_size=4096)
    layout = MegatronConfig(log_prob_chunk_tokens=64)
    logits = torch.randn(256, 4096, dtype={Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}[dtype])
    logits.requires_grad_()
    targets = torch.randint(0, 4096, (256,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        log_probs, _ = token_log_probs(logits, targets, temperature=1.0, vocab_size=4096, chunk_tokens=64)
        log_probs.sum().backward()
    measured = logits.nbytes + peak(profiler)
    estimate = logits_bytes(architecture, layout, 256, dtype, gradient=True)
    assert measured <= estimate <= 1.35 * measured


def peak(profiler: Any) -> int:
    """Most bytes that were allocated at once."""
    now = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
