"""What a checkpoint path holds, and the config and tokenizer of a Hugging Face folder."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_trainer.errors import CheckpointError
from opd_trainer.model.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LATEST = "latest_checkpointed_iteration.txt"
ITERATION = re.compile(r"iter_(\d{7,})")
RELEASE = "release"
"""In the marker and as a folder's name: weights without a step, as Megatron-LM's converters write them."""
RANK_FILE = "model_optim_rng.pt"
EXPORTED, CHECKPOINTS = "model", "checkpoints"
"""In a run directory: the Hugging Face folder that a run ends with, and its checkpoints."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Files of which a tokenizer has one; from tokenizer_config.json alone transformers would make one without words."""


class CheckpointKind(StrEnum):
    """Formats that models are loaded from."""

    huggingface = auto()
    """config.json beside safetensors files."""
    torch_dist = auto()
    """Megatron-core's sharded checkpoint."""
    torch = auto()
    """Megatron-LM's older checkpoint: one mp_rank_*/model_optim_rng.pt for each model-parallel rank."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that is there.

    Attributes:
        kind: its format.
        path: the folder that holds the weights themselves, also when a parent of it was given.
        step: optimizer step, None where the format has none.
    """

    kind: CheckpointKind
    path: Path
    step: int | None = None


def inspect(path: str | Path, ckpt_step: int | None = None) -> Checkpoint:
    """Finds out what a path holds; understands `iter_0000100` as well as the folder above it, and run directories.

    Args:
        path: a Hugging Face folder, a torch_dist or torch checkpoint, a folder of `iter_*` and `release` ones, or the
            directory of a run, of which the exported model is taken, or the latest checkpoint where it has none yet.
        ckpt_step: which of a folder's checkpoints; None takes the latest.

    Raises:
        CheckpointError: the path is missing, holds no checkpoint, or not that of `ckpt_step`.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder: no model can be loaded from it. Check the path's spelling")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: this is a file: models are loaded from folders. Name the folder that holds it"
        )
    # Before config.json, which a torch_dist checkpoint of ours has as well.
    kind = _megatron_kind(folder)
    if kind is not None:
        named = ITERATION.fullmatch(folder.name)
        step = int(named.group(1)) if named else None
        if ckpt_step not in (None, step):
            raise CheckpointError(
                f"{folder}: this is the checkpoint of step {step}, but ckpt_step is {ckpt_step}: one is wrong. "
                f"Name the folder above it, or leave ckpt_step out"
            )
        return Checkpoint(kind, folder, step)
    if (folder / "config.json").is_file():
        _refuse_step(folder, ckpt_step)
        return Checkpoint(CheckpointKind.huggingface, folder)
    if ckpt_step is None and (folder / EXPORTED / "config.json").is_file():
        return Checkpoint(CheckpointKind.huggingface, folder / EXPORTED)
    if (folder / CHECKPOINTS).is_dir():
        return _from_parent(folder / CHECKPOINTS, ckpt_step)
    return _from_parent(folder, ckpt_step)


def _refuse_step(folder: Path, ckpt_step: int | None) -> None:
    if ckpt_step is not None:
        raise CheckpointError(
            f"{folder}: a Hugging Face folder, but ckpt_step is {ckpt_step}: it holds no steps to choose from. "
            f"Leave ckpt_step out"
        )


def _megatron_kind(folder: Path) -> CheckpointKind | None:
    """The format of a Megatron checkpoint in the folder itself; None without one."""
    if (folder / ".metadata").is_file() or (folder / "metadata.json").is_file():
        return CheckpointKind.torch_dist
    if next(folder.glob(f"mp_rank_*/{RANK_FILE}"), None) is not None:
        return CheckpointKind.torch
    return None


def _from_parent(folder: Path, ckpt_step: int | None) -> Checkpoint:
    """The checkpoint below a folder: of `ckpt_step`, or else the one that the marker names, or else the last."""
    found: dict[int | None, Checkpoint] = {}
    for child in folder.iterdir():
        match = ITERATION.fullmatch(child.name)
        kind = _megatron_kind(child) if match or child.name == RELEASE else None
        if kind is not None:
            step = int(match.group(1)) if match else None
            found[step] = Checkpoint(kind, child, step)
    if not found:
        raise CheckpointError(
            f"{folder}: holds no checkpoint: neither config.json with safetensors (Hugging Face), nor .metadata "
            f"(torch_dist), nor mp_rank_*/{RANK_FILE} (torch), nor a folder iter_* or release with one. "
            f"It has {_listing(folder)}. Name the folder that holds the weights"
        )
    step = _latest(folder, found) if ckpt_step is None else ckpt_step
    if step not in found:
        there = ", ".join(RELEASE if number is None else str(number) for number in sorted(found, key=_by_step))
        wanted = RELEASE if step is None else f"step {step}"
        raise CheckpointError(f"{folder}: no checkpoint of {wanted}: it has {there}. Set ckpt_step to one of them")
    return found[step]


def _latest(folder: Path, found: Mapping[int | None, Checkpoint]) -> int | None:
    """What the marker names, or without one the highest step."""
    marker = folder / LATEST
    named = marker.read_text(encoding="utf-8").strip() if marker.is_file() else ""
    if named == RELEASE:
        return None
    return int(named) if named.isdigit() else max(found, key=_by_step)


def _by_step(step: int | None) -> int:
    """Sorts `release` before every step."""
    return -1 if step is None else step


def _listing(folder: Path, limit: int = 5) -> str:
    names = sorted(child.name for child in folder.iterdir())
    if not names:
        return "nothing in it"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def huggingface_folder(settings: ModelConfig) -> Path:
    """The folder with a model's config.json and tokenizer.

    Raises:
        CheckpointError: neither `load` nor `huggingface` is one.
    """
    if settings.huggingface is not None:
        folder = Path(settings.huggingface).expanduser()
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder: config.json and tokenizer come from it. Check the path")
        return folder
    if settings.load is not None:
        checkpoint = inspect(settings.load, settings.ckpt_step)
        if checkpoint.kind is CheckpointKind.huggingface or _has_tokenizer(checkpoint.path):
            return checkpoint.path
    raise CheckpointError(
        f"model: load={settings.load!r} brings neither config.json nor a tokenizer: the shape and the vocabulary are "
        f"unknown without. Set model.huggingface to a folder that has both"
    )


def load_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        CheckpointError: it is missing or is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no config.json: the model's shape is unknown. Name a Hugging Face folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path}: is no JSON ({error}): the model's shape is unknown. Download it again"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is no JSON object: the model's shape is unknown. Download it again")
    return config


def language_setting(folder: Path, key: str) -> Any:
    """What a folder's config.json says of the language model; a model of several parts keeps that in `text_config`.

    Raises:
        CheckpointError: there is no config.json, or it does not say.
    """
    config = load_config(folder)
    found = config.get(key, (config.get("text_config") or {}).get(key))
    if found is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: says nothing of {key}, without which models cannot be compared. "
            f"Download the model's own config.json again"
        )
    return found


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """A folder's tokenizer; never runs code from the folder and never asks the network.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    if not _has_tokenizer(folder):
        raise CheckpointError(
            f"{folder}: has no tokenizer: prompts cannot be turned into ids. Copy the model's files to it"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise CheckpointError(f"{folder}: transformers cannot read the tokenizer: {error}. Save it again") from error


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def eos_token_ids(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Tokens that end a response: those of generation_config.json, of config.json, and the tokenizer's own; sorted."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            found.update(value if isinstance(value, list) else [] if value is None else [value])
    own = tokenizer.eos_token_id
    if isinstance(own, int):
        found.add(own)
    return tuple(sorted(found))
