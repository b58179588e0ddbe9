"""Writes checkpoints as Megatron-LM's training and slime's converters do, with Megatron-core itself."""

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

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


def pad_vocabulary(source: Path, target: Path, rows: int) -> Path:
    """A copy of a Hugging Face folder, the vocabulary padded as Megatron-LM pads it, here with garbage."""
    tensors = load_file(source / "model.safetensors")
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        tensor = tensors[name]
        tensors[name] = torch.cat([tensor, torch.full((rows - len(tensor), tensor.shape[1]), 1e9)])
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    return target


def save_torch_dist(
    runtime: MegatronRuntime,
    model: MegatronModel,
    folder: Path,
    metadata: Mapping[str, bool],
    iteration: str,
    moments: str | None = None,
) -> Path:
    """A torch_dist checkpoint below a marker; `metadata` chooses a version's names, `moments` is a prefix of fp32
    optimizer state."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    directory = folder / iteration
    if runtime.rank == 0:
        directory.mkdir(parents=True)
        (folder / MARKER).write_text(iteration.removeprefix("iter_").lstrip("0"))
    torch.distributed.barrier()
    (module,) = model.modules
    with cpu_tensors(), inline_checkpoint_writer():
        state = {"model": module.sharded_state_dict(metadata=dict(metadata)), "iteration": 20}
        if moments is not None:
            weight = "embedding.word_embeddings.weight"
            zeros = torch.zeros(module.get_parameter(weight).shape)
            state["optimizer"] = ShardedTensor.from_rank_offsets(moments + weight, zeros, replica_id=0)
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        dist_checkpointing.save(state, str(directory), strategy, content_metadata=dict(metadata))
    return folder


def save_rank_file(
    directory: Path, name: str, states: Sequence[Mapping[str, Any]], *, transformer_engine: bool
) -> None:
    """One rank's file of the older format, with or without Transformer Engine's names of the norms."""
    chunks = [_renamed(state) if transformer_engine else dict(state) for state in states]
    named = (
        {"model": chunks[0]} if len(chunks) == 1 else {f"model{number}": chunk for number, chunk in enumerate(chunks)}
    )
    (directory / name).mkdir(parents=True)
    torch.save({**common(), **named}, directory / name / "model_optim_rng.pt")


def _renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in state.items():
        theirs = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        found[theirs.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")] = value
    return found | {"decoder.layers.0.self_attention.linear_qkv._extra_state": torch.zeros(4, dtype=torch.uint8)}


@dataclass(frozen=True)
class Job:
    """What several ranks write.

    Attributes:
        source: Hugging Face folder.
        target: where to.
        architecture: of the model.
        settings: the ranks' layout.
    """

    source: Path
    target: Path
    architecture: Architecture
    settings: MegatronConfig


def save_ranks(rank: int, world_size: int, rendezvous: str, job: Job) -> None:
    """For `run_gloo`: every rank writes its file, as Megatron-LM names it."""
    settings = job.settings
    runtime = MegatronRuntime(rank, world_size, rendezvous, settings, seed=9)
    runtime.start()
    model = loaded(runtime, job.architecture, job.source)
    name = f"mp_rank_{runtime.tp_rank:02d}"
    if settings.pipeline_parallel > 1:
        name += f"_{runtime.pp_rank:03d}"
    if settings.expert_parallel > 1:
        name += f"_{runtime.ep_rank:03d}"
    state = model.modules[0].state_dict_for_save_checkpoint()
    transformer_engine = job.architecture.experts is None
    save_rank_file(job.target, name, [state], transformer_engine=transformer_engine)
    runtime.close()


def save_dist_ranks(rank: int, world_size: int, rendezvous: str, job: Job) -> None:
    """For `run_gloo`: a torch_dist checkpoint written from several ranks."""
    runtime = MegatronRuntime(rank, world_size, rendezvous, job.settings, seed=9)
    runtime.start()
    save_torch_dist(runtime, loaded(runtime, job.architecture, job.source), job.target, {}, "iter_0000020")
    runtime.close()
