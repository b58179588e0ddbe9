"""Writes checkpoints as Megatron-LM's training and slime's converters do, with Megatron-core itself."""

import argparse
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd_trainer.megatron.build import MegatronModel, build_model
from opd_trainer.megatron.compat import cpu_tensors, inline_checkpoint_writer
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.families.base import Architecture
from opd_trainer.megatron.huggingface import load_hf_weights
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.model.config import ModelConfig

MARKER = "latest_checkpointed_iteration.txt"


def common(iteration: int = 20) -> dict[str, Any]:
    """What Megatron-LM saves beside the weights: its settings, and states of generators that hold numpy arrays."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    settings = argparse.Namespace(
        tensor_model_parallel_size=1,
        params_dtype=torch.float32,
        attention_backend=AttnBackend.flash,
        lr=np.float64(0.1),
    )
    settings.model_type = ModelType.encoder_or_decoder
    generators = {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}
    generators["torch_rng_state"] = torch.get_rng_state()
    return {"args": settings, "checkpoint_version": 3.0, "iteration": iteration, "rng_state": [generators]}


def loaded(runtime: MegatronRuntime, architecture: Architecture, folder: Path) -> MegatronModel:
    """A model in the runtime's layout with the weights of a Hugging Face folder."""
    model = build_model(runtime, architecture, ModelConfig(), runtime.settings, trainable=False)
    load_hf_weights(model, folder)
    return model


def padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows of the embedding up to a multiple, as Megatron-LM pads it; garbage, which nothing may read."""
    return torch.cat([tensor, torch.full((rows - len(tensor), *tensor.shape[1:]), 1e9)])


def save_torch_dist(
    runtime: MegatronRuntime, model: MegatronModel, folder: Path, metadata: Mapping[str, bool], iteration: str
) -> Path:
    """A torch_dist checkpoint below a marker; `metadata` chooses a version's names."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    directory = folder / iteration
    if runtime.rank == 0:
        directory.mkdir(parents=True)
        (folder / MARKER).write_text(iteration.removeprefix("iter_").lstrip("0"))
    torch.distributed.barrier()
    (module,) = model.modules
    with cpu_tensors(), inline_checkpoint_writer():
        state = {"model": module.sharded_state_dict(metadata=dict(metadata)), "iteration": 20}
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        dist_checkpointing.save(state, str(directory), strategy, content_metadata=dict(metadata))
    return folder


def save_rank_file(
    directory: Path, name: str, states: list[Mapping[str, Any]], *, transformer_engine: bool, vocab_rows: int
) -> None:
    """One rank's file of the older format; norms under Transformer Engine's names, the vocabulary padded."""
    chunks = [dict(_renamed(state, vocab_rows) if transformer_engine else state) for state in states]
    named = (
        {"model": chunks[0]} if len(chunks) == 1 else {f"model{number}": chunk for number, chunk in enumerate(chunks)}
    )
    (directory / name).mkdir(parents=True)
    torch.save({**common(), **named}, directory / name / "model_optim_rng.pt")


def _renamed(state: Mapping[str, Any], vocab_rows: int) -> dict[str, Any]:
    found = {}
    for name, value in state.items():
        theirs = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        theirs = theirs.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
        vocabulary = "word_embeddings" in name or name.startswith("output_layer.weight")
        found[theirs] = padded(value, vocab_rows) if vocabulary and value is not None else value
    return found | {"decoder.layers.0.self_attention.linear_qkv._extra_state": torch.zeros(4, dtype=torch.uint8)}


def save_ranks(
    rank: int,
    world_size: int,
    rendezvous: str,
    source: Path,
    directory: Path,
    architecture: Architecture,
    settings: MegatronConfig,
) -> None:
    """For `run_gloo`: every rank writes its file, as Megatron-LM names it."""
    runtime = MegatronRuntime(rank, world_size, rendezvous, settings, seed=9)
    runtime.start()
    model = loaded(runtime, architecture, source)
    name = f"mp_rank_{runtime.tp_rank:02d}"
    if settings.pipeline_parallel > 1:
        name += f"_{runtime.pp_rank:03d}"
    if settings.expert_parallel > 1:
        name += f"_{runtime.ep_rank:03d}"
    state = model.modules[0].state_dict_for_save_checkpoint()
    rows = 64 // settings.tensor_parallel
    save_rank_file(directory, name, [state], transformer_engine=architecture.experts is None, vocab_rows=rows)
    runtime.close()


def save_dist_ranks(
    rank: int,
    world_size: int,
    rendezvous: str,
    source: Path,
    folder: Path,
    architecture: Architecture,
    settings: MegatronConfig,
) -> None:
    """For `run_gloo`: a torch_dist checkpoint written from several ranks."""
    runtime = MegatronRuntime(rank, world_size, rendezvous, settings, seed=9)
    runtime.start()
    save_torch_dist(runtime, loaded(runtime, architecture, source), folder, {}, "iter_0000020")
    runtime.close()
