"""From a model's settings to a model with its weights."""

from dataclasses import dataclass
from pathlib import Path

import torch

from opd_trainer.errors import CheckpointError
from opd_trainer.megatron.build import MegatronModel, build_model
from opd_trainer.megatron.checkpoint import load_weights, weight_dtypes
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.families.base import Architecture
from opd_trainer.megatron.families.registry import architecture_from_config, architecture_from_hf
from opd_trainer.megatron.huggingface import load_hf_weights, stored_dtypes
from opd_trainer.megatron.rank_files import load_rank_files, rank_file_dtypes
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.model.config import Dtype, ModelConfig
from opd_trainer.model.folder import Checkpoint, CheckpointKind, huggingface_folder, inspect, load_config


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its weights.

    Attributes:
        model: this process's part of it.
        folder: has its tokenizer.
    """

    model: MegatronModel
    folder: Path


def config_folder(settings: ModelConfig) -> Path:
    """The folder with the config.json and the tokenizer of a model that is loaded: its own if it has them.

    Raises:
        CheckpointError: nothing can be loaded from the path, or neither it nor `huggingface` has them.
    """
    if settings.load is not None:
        path = inspect(settings.load, settings.ckpt_step).path
        if (path / "config.json").is_file():
            return path
    return huggingface_folder(settings)


def architecture_of(settings: ModelConfig, vocab_size: int | None) -> Architecture:
    """The shape of a model: that of its checkpoint, or the one that is asked for.

    Args:
        settings: of the model.
        vocab_size: ids of the tokenizer, for a model trained from scratch.

    Raises:
        CheckpointError: the checkpoint cannot be read, or a model from scratch has no tokenizer.
    """
    if settings.load is not None:
        return architecture_from_hf(load_config(config_folder(settings)))
    if vocab_size is None:
        raise CheckpointError(
            "model.load: null, and no vocabulary to train a model from scratch with. "
            "Set model.load to a checkpoint, or model.huggingface to a folder with a tokenizer"
        )
    return architecture_from_config(settings.architecture, vocab_size)


def load_model(
    runtime: MegatronRuntime,
    settings: ModelConfig,
    megatron: MegatronConfig,
    *,
    vocab_size: int | None,
    trainable: bool,
    value_head: bool = False,
) -> LoadedModel:
    """Builds a model and fills it with its weights, or with seeded random ones where there is nothing to load.

    Args:
        runtime: started.
        settings: of the model.
        megatron: parallel layout.
        vocab_size: ids of the tokenizer, for a model trained from scratch.
        trainable: False for teachers and references.
        value_head: whether the model's output is a value; the head starts at 0 where a language model is loaded.

    Raises:
        UserError: it cannot be loaded, or cannot be cut into this parallel layout.
    """
    found = architecture_of(settings, vocab_size)
    folder = config_folder(settings)
    if found.value_head and not value_head:
        raise CheckpointError(
            f"{settings.load}: a value model, which gives no log-probs: it can be a critic only. Name a language model"
        )
    architecture = found.with_value_head() if value_head else found
    model = build_model(runtime, architecture, settings, megatron, trainable=trainable)
    if settings.load is not None:
        fill_model(model, inspect(settings.load, settings.ckpt_step), with_head=architecture == found)
    return LoadedModel(model, folder)


def fill_model(model: MegatronModel, checkpoint: Checkpoint, *, with_head: bool = True) -> None:
    """Fills a model from a checkpoint of any format and layout; collective.

    Args:
        model: to fill.
        checkpoint: what to read.
        with_head: False leaves the model's output head as it is.

    Raises:
        UserError: the checkpoint is not of this model, or cannot be read.
    """
    match checkpoint.kind:
        case CheckpointKind.huggingface:
            load_hf_weights(model, checkpoint.path, with_head=with_head)
        case CheckpointKind.torch_dist:
            load_weights(model, checkpoint.path, with_head=with_head)
        case CheckpointKind.torch:
            load_rank_files(model, checkpoint.path, with_head=with_head)


def lossless_dtype(checkpoint: Checkpoint) -> Dtype:
    """The narrower of our dtypes that holds every weight of a checkpoint exactly."""
    match checkpoint.kind:
        case CheckpointKind.huggingface:
            found = stored_dtypes(checkpoint.path)
        case CheckpointKind.torch_dist:
            found = weight_dtypes(checkpoint.path)
        case CheckpointKind.torch:
            found = rank_file_dtypes(checkpoint.path)
    return Dtype.bfloat16 if found == {torch.bfloat16} else Dtype.float32
