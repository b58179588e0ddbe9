"""Weights between Megatron models and Hugging Face folders (safetensors), without loss."""

import json
import shutil
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from opd_trainer.errors import CheckpointError, ShapeMismatch
from opd_trainer.megatron.build import MegatronModel, local_rules
from opd_trainer.megatron.families.base import (
    LM_HEAD,
    VALUE_HEAD,
    Layout,
    WeightRule,
    hf_shapes,
    shard,
    unshard,
    weight_rules,
)
from opd_trainer.megatron.families.registry import to_hf_config
from opd_trainer.model.folder import TOKENIZER_FILES

MAX_FILE_BYTES = 4 * 1024**3
"""Size at which `save_hf_folder` starts another safetensors file."""

INDEX = "model.safetensors.index.json"

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
"""Of safetensors, with less than 32 bits."""

COPIED_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""What belongs to a model besides its weights and config.json."""


def load_hf_weights(model: MegatronModel, folder: Path, *, with_head: bool = True) -> None:
    """Fills a model from the safetensors files of a Hugging Face folder.

    Each process reads the tensors of its own pipeline stage. Weights are cast to the model's dtype.

    Args:
        model: to fill.
        folder: with the files.
        with_head: False leaves the model's output head as it is; the folder may hold another one.

    Raises:
        CheckpointError: there are no safetensors, or tensors are missing or unexpected.
        ShapeMismatch: a tensor does not have the shape that the architecture asks for.
    """
    files = tensor_files(folder)
    heads = set() if with_head else {LM_HEAD, VALUE_HEAD}
    wanted = set(hf_shapes(model.architecture)) - heads
    missing = sorted(wanted - set(files))
    unexpected = sorted(name for name in set(files) - wanted - heads if not _redundant(name, model))
    if missing or unexpected:
        raise CheckpointError(
            f"{folder}: weights do not fit the {model.architecture.family} model of its config.json: "
            f"missing {_list(missing)}, unexpected {_list(unexpected)}. Check that both are of the same model"
        )
    with SafetensorsReader(files) as reader:
        fill(model, reader.read, wanted)


def fill(model: MegatronModel, read: Callable[[str], Tensor], wanted: AbstractSet[str]) -> None:
    """Fills the parameters of a model that are made of `wanted`, from whole tensors.

    Args:
        model: to fill.
        read: gives a tensor by its Hugging Face name.
        wanted: names of the tensors.

    Raises:
        ShapeMismatch: a tensor does not have the shape that the architecture asks for.
    """
    shapes = hf_shapes(model.architecture)
    with torch.no_grad():
        for rule, parameter in model.parameters():
            if not set(rule.huggingface) <= wanted:
                continue
            tensors = [read(name) for name in rule.huggingface]
            for name, tensor in zip(rule.huggingface, tensors, strict=True):
                if tuple(tensor.shape) != shapes[name]:
                    raise ShapeMismatch(
                        f"{name}: shape {tuple(tensor.shape)}: the model's config asks for {shapes[name]}. "
                        f"Check that weights and config.json are of the same model"
                    )
            parameter.copy_(shard(tensors, rule.layout, model.architecture, *model.cut(rule)))


def export_hf_weights(
    model: MegatronModel, value: Callable[[Tensor], Tensor] = lambda parameter: parameter
) -> Iterator[tuple[str, Tensor]]:
    """The whole model's tensors under their Hugging Face names, one after the other, in layer order.

    Collective over the ranks that share a replica of the model or its experts: each of them has to exhaust the
    iterator, and each gets every tensor. A tensor may share memory with the live weights: copy it before the next
    optimizer step if it is kept.

    Args:
        model: whose tensors.
        value: what to export in place of a parameter, on the model's device; called when its turn comes.
    """
    mine = {rule.megatron: model.modules[chunk].get_parameter(name) for rule, name, chunk in local_rules(model)}
    rules = weight_rules(model.architecture)
    owners = _owners(model, set(mine), rules)
    for rule in rules:
        parameter = mine.get(rule.megatron)
        whole = _whole(model, rule, None if parameter is None else value(parameter), owners[rule.megatron])
        yield from zip(rule.huggingface, whole, strict=True)


def _owners(model: MegatronModel, mine: set[str], rules: list[WeightRule]) -> dict[str, int]:
    """The first pipeline stage that has each parameter."""
    stages: list[set[str]] = [mine]
    if model.runtime.pp_size > 1:
        stages = [set() for _ in range(model.runtime.pp_size)]
        distributed.all_gather_object(stages, mine, group=model.runtime.pp_group)
    with_layer = {rule.layer: _stage_with(rule, stages) for rule in rules if rule.expert is None}
    return {
        rule.megatron: with_layer[rule.layer] if rule.expert is not None else _stage_with(rule, stages)
        for rule in rules
    }


def _stage_with(rule: WeightRule, stages: list[set[str]]) -> int:
    return next(stage for stage, names in enumerate(stages) if rule.megatron in names)


def _whole(model: MegatronModel, rule: WeightRule, parameter: Tensor | None, owner: int) -> tuple[Tensor, ...]:
    """The Hugging Face tensors of one rule, on each rank."""
    runtime = model.runtime
    if runtime.pp_rank != owner or parameter is None:
        shapes = hf_shapes(model.architecture)
        whole = tuple(torch.empty(shapes[name], dtype=model.dtype, device=runtime.device) for name in rule.huggingface)
    else:
        shards, (_, size) = [parameter.detach()], model.cut(rule)
        if size > 1 and rule.layout is not Layout.replicated:
            shards = [torch.empty_like(shards[0]) for _ in range(size)]
            distributed.all_gather(shards, parameter.detach().contiguous(), group=runtime.tp_group)
        whole = unshard(shards, rule.layout, model.architecture)
    if rule.expert is not None and runtime.ep_size > 1 and runtime.pp_rank == owner:
        assert model.architecture.experts is not None, "rules of experts come with experts"
        whole = _broadcast(whole, runtime.ep_group, rule.expert * runtime.ep_size // model.architecture.experts.count)
    if runtime.pp_size > 1:
        whole = _broadcast(whole, runtime.pp_group, owner)
    return whole


def _broadcast(tensors: tuple[Tensor, ...], group: ProcessGroup, rank: int) -> tuple[Tensor, ...]:
    """The tensors of one rank of a group, on all of them; those of the others are overwritten."""
    tensors = tuple(tensor.contiguous() for tensor in tensors)
    for tensor in tensors:
        distributed.broadcast(tensor, distributed.get_global_rank(group, rank), group=group)
    return tensors


def describe(model: MegatronModel, folder: Path, tokenizer_from: Path, dtype: torch.dtype | None = None) -> None:
    """Writes what a model needs besides its weights: config.json, and the tokenizer files of another folder.

    Args:
        model: gives the config.
        folder: exists.
        tokenizer_from: folder whose tokenizer files are copied.
        dtype: that the config names; None is the model's.
    """
    config = {**to_hf_config(model.architecture), **_token_ids(tokenizer_from)}
    config["dtype"] = str(dtype or model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in COPIED_FILES:
        if (tokenizer_from / name).is_file() and tokenizer_from.resolve() != folder.resolve():
            shutil.copyfile(tokenizer_from / name, folder / name)


def save_hf_folder(model: MegatronModel, folder: Path, tokenizer_from: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a model as a Hugging Face folder that transformers loads; collective like `export_hf_weights`.

    Args:
        model: what to write; the process of global rank 0 writes, the others take part in gathering.
        folder: created if it does not exist.
        tokenizer_from: folder whose tokenizer files are copied.
        dtype: of the weights in the files; None keeps the model's.
    """
    writes = model.runtime.rank == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        describe(model, folder, tokenizer_from, dtype)
    writer = _Writer(folder) if writes else None
    for name, tensor in export_hf_weights(model):
        if writer is not None:
            writer.add(name, tensor.to("cpu", dtype or tensor.dtype, copy=True).contiguous())
    if writer is not None:
        writer.finish()


def _token_ids(folder: Path) -> dict[str, Any]:
    """The special tokens that a config.json names, from the folder that the tokenizer comes from."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}


class _Writer:
    """Writes tensors into safetensors files of a bounded size, with an index when there is more than one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor; may write a file."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > MAX_FILE_BYTES:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self._total_bytes += size

    def finish(self) -> None:
        """Writes what is left, and gives the files their final names."""
        self._flush()
        count = len(self._files)
        index: dict[str, str] = {}
        for number, names in enumerate(self._files, 1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).replace(self._folder / final)
            index.update(dict.fromkeys(names, final))
        (self._folder / INDEX).unlink(missing_ok=True)
        if count > 1:
            content = {"metadata": {"total_size": self._total_bytes}, "weight_map": index}
            (self._folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _part(self, number: int) -> Path:
        return self._folder / f"model-part-{number}.tmp"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        self._files.append(list(self._pending))
        save_file(self._pending, self._part(len(self._files)), metadata={"format": "pt"})
        self._pending, self._pending_bytes = {}, 0


class SafetensorsReader:
    """Reads single tensors out of several safetensors files; a context manager."""

    def __init__(self, files: dict[str, Path]) -> None:
        """Takes the file of each tensor, as `tensor_files` gives it."""
        self._files = files
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *_error: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open.clear()

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        from safetensors import safe_open

        path = self._files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        return self._open[path].get_tensor(name)


def tensor_files(folder: Path) -> dict[str, Path]:
    """The safetensors file of each tensor of a Hugging Face folder, by Hugging Face name.

    Raises:
        CheckpointError: there are none, or one that the index names is not there.
    """
    index = folder / INDEX
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: folder / file for name, file in names.items()}
        absent = sorted({str(file) for file in files.values() if not file.is_file()})
        if absent:
            raise CheckpointError(f"{index}: names {_list(absent)}, which is not there: download it again")
        return files
    from safetensors import safe_open

    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    if not files:
        raise CheckpointError(
            f"{folder}: no .safetensors file: weights are read from safetensors only. "
            f"Save the model again with transformers' save_pretrained"
        )
    return files


def stored_dtypes(folder: Path) -> set[torch.dtype]:
    """The floating-point dtypes of the tensors of a Hugging Face folder.

    Raises:
        CheckpointError: there are no safetensors.
    """
    from safetensors import safe_open

    found: set[str] = set()
    for path in set(tensor_files(folder).values()):
        with safe_open(path, framework="pt") as file:
            names: list[str] = file.keys()
            found.update(file.get_slice(name).get_dtype() for name in names)
    return {_DTYPES.get(name, torch.float32) for name in found if "F" in name}


def _redundant(name: str, model: MegatronModel) -> bool:
    """Whether a file may hold this tensor although the model has no use for it."""
    return name.endswith("rotary_emb.inv_freq") or (name == LM_HEAD and model.architecture.tie_embeddings)


def _list(names: list[str], limit: int = 5) -> str:
    if not names:
        return "none"
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
