"""From a model's settings to a model with its weights."""

from dataclasses import dataclass
from pathlib import Path

from opd_trainer.errors import CheckpointError
from opd_trainer.megatron.build import MegatronModel, build_model
from opd_trainer.megatron.checkpoint import load_weights
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.families.base import Architecture
from opd_trainer.megatron.families.registry import architecture_from_config, architecture_from_hf
from opd_trainer.megatron.huggingface import load_hf_weights
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.model.config import ModelConfig
from opd_trainer.model.folder import CheckpointKind, huggingface_folder, inspect, load_config


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
        checkpoint = inspect(settings.load, settings.ckpt_step)
        load = load_hf_weights if checkpoint.kind is CheckpointKind.huggingface else load_weights
        load(model, checkpoint.path, with_head=architecture == found)
    return LoadedModel(model, folder)
