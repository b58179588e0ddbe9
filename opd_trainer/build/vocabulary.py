"""What the controller needs to know of a model to talk to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_trainer.megatron.families.registry import architecture_from_config, to_hf_config
from opd_trainer.megatron.source import config_folder
from opd_trainer.model.config import ModelConfig
from opd_trainer.model.folder import eos_token_ids, load_tokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the controller needs to know of a model to talk to it.

    Attributes:
        folder: holds its tokenizer.
        tokenizer: a `transformers` tokenizer.
        eos_token_ids: tokens that end a response.
        config: its `transformers` configuration.
    """

    folder: Path
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    config: Any


def vocabulary_of(model: ModelConfig) -> Vocabulary:
    """Reads config and tokenizer of a model that is loaded, or is to be trained from scratch.

    Raises:
        CheckpointError: there are none.
    """
    from transformers import AutoConfig

    folder = config_folder(model)
    tokenizer = load_tokenizer(folder)
    if model.load is None:
        described = to_hf_config(architecture_from_config(model.architecture, len(tokenizer)))
        config = AutoConfig.for_model(**described)
    else:
        config = AutoConfig.from_pretrained(folder)
    return Vocabulary(folder, tokenizer, eos_token_ids(folder, tokenizer), config)
