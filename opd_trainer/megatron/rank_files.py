"""Reads Megatron-LM's older `torch` format: mp_rank_*/model_optim_rng.pt, one file for each model-parallel rank.

Weights only, and no code: a file may name the few classes that Megatron-LM's settings and generator states consist of,
and nothing else. Files are memory-mapped, so that a process reads the tensors that it needs.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_trainer.errors import CheckpointError
from opd_trainer.megatron.build import MegatronModel
from opd_trainer.megatron.compat import quiet
from opd_trainer.megatron.families.base import (
    LM_HEAD,
    VALUE_HEAD,
    Architecture,
    Layout,
    WeightRule,
    unshard,
    weight_rules,
)
from opd_trainer.megatron.huggingface import fill
from opd_trainer.megatron.naming import NORMS
from opd_trainer.model.folder import RANK_FILE

_RANKS = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_CHUNK = re.compile(r"model\d+")
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.")
_EXPERT = re.compile(r"(local_experts\.)(\d+)\.")
_GROUPED_EXPERT = re.compile(r"experts\.(linear_fc[12])\.weight(\d+)$")


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """Whose file it is.

    Attributes:
        pipeline: pipeline stage.
        expert: expert-parallel rank.
        tensor: tensor-parallel rank.
    """

    pipeline: int
    expert: int
    tensor: int


def load_rank_files(model: MegatronModel, directory: Path, *, with_head: bool = True) -> None:
    """Fills a model, of any parallel layout, from a checkpoint of any other.

    Args:
        model: to fill.
        directory: with the mp_rank_* folders.
        with_head: False leaves the model's output head as it is.

    Raises:
        CheckpointError: a file cannot be read without running code, or holds no GPT model of Megatron-core.
        ShapeMismatch: a tensor does not have the shape that the architecture asks for.
    """
    files = RankFiles(directory, model.architecture)
    heads = set() if with_head else {LM_HEAD, VALUE_HEAD}
    fill(model, files.read, {name for rule in files.rules for name in rule.huggingface} - heads)


class RankFiles:
    """All ranks' files of a checkpoint, as whole Hugging Face tensors."""

    def __init__(self, directory: Path, architecture: Architecture) -> None:
        """Opens every file.

        Args:
            directory: with the mp_rank_* folders.
            architecture: of the model.

        Raises:
            CheckpointError: see `load_rank_files`.
        """
        self.rules = weight_rules(architecture)
        self._directory, self._architecture = directory, architecture
        self._rule_of = {name: rule for rule in self.rules for name in rule.huggingface}
        self._shards = _whole_names({rank: _chunks(path) for rank, path in rank_files(directory).items()}, architecture)
        self._last: tuple[WeightRule, tuple[Tensor, ...]] | None = None

    def read(self, name: str) -> Tensor:
        """A whole tensor by its Hugging Face name.

        Raises:
            CheckpointError: it is not there.
        """
        rule = self._rule_of[name]
        if self._last is None or self._last[0] is not rule:
            self._last = (rule, self._join(rule))
        return self._last[1][rule.huggingface.index(name)]

    def _join(self, rule: WeightRule) -> tuple[Tensor, ...]:
        shards = self._shards.get(rule.megatron)
        if not shards:
            there = ", ".join(list(self._shards)[:3])
            raise CheckpointError(
                f"{self._directory}: has no {rule.megatron}, which the {self._architecture.family} model of "
                f"config.json needs; it has {there}, ... Check that both are of the same Megatron-core GPTModel"
            )
        return unshard(self._cut(rule, [shards[number] for number in sorted(shards)]), rule.layout, self._architecture)

    def _cut(self, rule: WeightRule, shards: list[Tensor]) -> list[Tensor]:
        """The shards of a parameter that is cut; one of them where each rank has all of it."""
        if rule.layout is Layout.replicated:
            return shards[:1]
        if rule.expert is None or self._architecture.experts is None:
            return shards
        width = self._architecture.experts.intermediate_size
        whole = shards[0].shape[1] == width if rule.layout is Layout.columns else shards[0].shape[0] == 2 * width
        return shards[:1] if whole else shards


def rank_file_dtypes(directory: Path) -> set[torch.dtype]:
    """The floating-point dtypes of the weights in a checkpoint.

    Raises:
        CheckpointError: see `load_rank_files`.
    """
    states = [state for path in rank_files(directory).values() for state in _chunks(path)]
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def rank_files(directory: Path) -> dict[Rank, Path]:
    """The file of each rank, sorted by rank.

    A single suffix is a pipeline stage or an expert-parallel rank: only the files themselves tell which.
    """
    found = {}
    for path in directory.glob(f"mp_rank_*/{RANK_FILE}"):
        match = _RANKS.fullmatch(path.parent.name)
        if match is None:
            raise CheckpointError(f"{path.parent}: is no mp_rank_TT, mp_rank_TT_PPP or mp_rank_TT_PPP_EEE. Rename it")
        tensor, second, third = (int(part) if part else 0 for part in match.groups())
        found[Rank(second, third, tensor)] = path
    return dict(sorted(found.items()))


def _chunks(path: Path) -> list[Mapping[str, Any]]:
    """The model in a rank's file: one state for each of its chunks of layers, in order."""
    state = load_safely(path)
    if "model" in state:
        return [state["model"]]
    chunks = [state[name] for name in sorted(filter(_CHUNK.fullmatch, state), key=lambda name: int(name[5:]))]
    if not chunks:
        raise CheckpointError(
            f"{path}: has no entry 'model', only {', '.join(map(str, state))}. Name another checkpoint"
        )
    return chunks


def load_safely(path: Path) -> dict[str, Any]:
    """Unpickles a file with an allow-list: tensors, Megatron-LM's settings, numpy arrays.

    Raises:
        CheckpointError: it names anything else, or is no file of torch.save.
    """
    with quiet():
        import megatron.core  # noqa: F401  (allows its own classes)
    from numpy import dtypes
    from numpy._core import multiarray

    numbers = [value for value in vars(dtypes).values() if isinstance(value, type)]
    # Files of numpy 1 spell the module without the underscore.
    spelled = {name: getattr(multiarray, name) for name in ("_reconstruct", "scalar")}
    old = [(value, f"numpy.core.multiarray.{name}") for name, value in spelled.items()]
    try:
        with torch.serialization.safe_globals([*numbers, *spelled.values(), *old]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = next(
            (line for line in str(error).splitlines() if "global" in line.lower()), str(error).splitlines()[0]
        )
        raise CheckpointError(
            f"{path}: cannot be read as weights only: {reason}. Files that bring code of their own are refused: save "
            f"the checkpoint again in the format torch_dist"
        ) from error


def _whole_names(
    ranks: Mapping[Rank, list[Mapping[str, Any]]], architecture: Architecture
) -> dict[str, dict[int, Tensor]]:
    """The shards of each parameter by tensor-parallel rank, under its name in the whole model.

    Layers are counted from 0 in each chunk of each pipeline stage; the first chunks of all stages come first.
    """
    ranks = _with_experts_apart(ranks)
    found: dict[str, dict[int, Tensor]] = {}
    experts = architecture.experts.count // len({rank.expert for rank in ranks}) if architecture.experts else 0
    first_layer = 0
    for chunk in range(max(map(len, ranks.values()))):
        for stage in sorted({rank.pipeline for rank in ranks}):
            layers = set()
            for rank, chunks in ranks.items():
                if rank.pipeline != stage:
                    continue
                for name, tensor in chunks[chunk].items():
                    layers.update(match.group(2) for match in [_LAYER.search(name)] if match)
                    if isinstance(tensor, Tensor):
                        whole = _whole_name(name, first_layer, rank.expert * experts)
                        # Expert-parallel ranks have the same of everything but their experts.
                        found.setdefault(whole, {}).setdefault(rank.tensor, tensor)
            first_layer += len(layers)
    return found


def _whole_name(name: str, first_layer: int, first_expert: int) -> str:
    name = _GROUPED_EXPERT.sub(r"experts.local_experts.\2.\1.weight", name.removeprefix("module."))
    name = _LAYER.sub(lambda match: f"{match.group(1)}{int(match.group(2)) + first_layer}.", name, count=1)
    name = _EXPERT.sub(lambda match: f"{match.group(1)}{int(match.group(2)) + first_expert}.", name, count=1)
    for theirs, ours in NORMS:
        name = name.replace(theirs, ours)
    return name


def _with_experts_apart(ranks: Mapping[Rank, list[Mapping[str, Any]]]) -> dict[Rank, list[Mapping[str, Any]]]:
    """Tells experts from stages in names with one suffix: each expert-parallel rank has both ends of the model."""
    ends = ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight")
    if all(any(name.endswith(end) for chunk in chunks for name in chunk) for chunks in ranks.values() for end in ends):
        return {Rank(0, rank.pipeline or rank.expert, rank.tensor): chunks for rank, chunks in ranks.items()}
    return dict(ranks)
