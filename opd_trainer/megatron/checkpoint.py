"""Megatron torch_dist checkpoints: weights, optimizer, schedule and RNG, bit-exact on resume; or weights alone.

A checkpoint is one directory. The worker adds the model's Hugging Face config.json and tokenizer to it, so that it can
be loaded as a model without anything else.
"""

import contextlib
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from opd_trainer.errors import CheckpointError
from opd_trainer.megatron.build import MegatronModel
from opd_trainer.megatron.compat import cpu_tensors
from opd_trainer.megatron.naming import OPTIMIZER, naming_of
from opd_trainer.megatron.optimizer import Optimizer
from opd_trainer.megatron.optimizer_state import copy_of, set_state, sharded_state, wanted_state
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.megatron.saving import Saving, begin, quietly

PREFIX = "model."
"""Of our names of the weights in the state of a training run."""
HEAD = "output_layer."


def begin_save(directory: Path, model: MegatronModel, optimizer: Optimizer, *, background: bool = False) -> Saving:
    """Begins to write the training state into `directory`, which exists and holds no checkpoint; collective.

    Args:
        directory: to write to.
        model: whose weights.
        optimizer: its state, schedule and number of steps.
        background: write in a thread, from a copy of the state on the host.

    Raises:
        CheckpointError: this rank cannot write.
    """
    weights = _model_state(model)
    with cpu_tensors():
        optimizer_state = sharded_state(optimizer, weights)
    state = {
        "model": weights,
        "optimizer": optimizer_state,
        "num_steps": optimizer.num_steps,
        "world_size": model.runtime.world_size,
        "rng": _rng_state(model.runtime),
    }
    return begin(directory, state, background=background)


def restore(directory: Path, model: MegatronModel, optimizer: Optimizer) -> None:
    """The inverse of `begin_save`; collective. The random state is restored when as many workers save and restore.

    Raises:
        CheckpointError: `directory` holds no training state of this model.
    """
    weights = _model_state(model)
    with cpu_tensors():
        optimizer_state = wanted_state(optimizer, weights, _tensors(directory).keys())
    wanted_before, wanted = copy_of(optimizer_state), {"model": weights}
    same_layout = _load_common(directory)["world_size"] == model.runtime.world_size
    if same_layout:
        wanted["rng"] = _rng_state(model.runtime)
    state = _load(directory, wanted)
    _set_weights(model, state["model"])
    # On its own, because a tensor of the checkpoint may be the weight and the main parameter of it.
    loaded = _load(directory, {"optimizer": optimizer_state})
    with cpu_tensors():
        set_state(optimizer, wanted_before, loaded["optimizer"], loaded["num_steps"])
    if same_layout:
        _set_rng(state["rng"])


def save_weights(directory: Path, model: MegatronModel) -> None:
    """Writes the weights alone, under Megatron-LM's names, into `directory`, which exists and is empty; collective.

    Raises:
        CheckpointError: a rank cannot write.
    """
    state = {"model": _model_state(model, prefix=""), "checkpoint_version": 3.0, "iteration": 0}
    begin(directory, state, background=False).finish()


def load_weights(model: MegatronModel, directory: Path, *, with_head: bool = True) -> None:
    """Fills a model, of any parallel layout, from a checkpoint of ours or of Megatron-LM's; collective.

    Args:
        model: to fill.
        directory: of the checkpoint.
        with_head: False leaves the model's output head as it is; the checkpoint may hold another one.

    Raises:
        CheckpointError: `directory` holds no weights of this model.
        ShapeMismatch: its vocabulary is smaller than the model's.
    """
    (module,) = model.modules
    naming = naming_of(directory, _tensors(directory), model.architecture)
    prefix = naming.prefix
    state = _model_state(model, prefix, naming.metadata)
    # State that Transformer Engine keeps for 8-bit training.
    empty = {name: None for name in state if name.endswith("_extra_state")}
    head = prefix + HEAD
    kept = {} if with_head else {name: module.state_dict()[name.removeprefix(prefix)] for name in state if head in name}
    wanted = {name: value for name, value in state.items() if name not in empty | kept}
    loaded = _load(directory, {"model": naming.rename(wanted)})
    _set_weights(model, {**loaded["model"], **empty, **kept}, prefix)


def weight_dtypes(directory: Path) -> set[torch.dtype]:
    """The floating-point dtypes of the weights in a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    found = {tensor.dtype for name, tensor in _tensors(directory).items() if OPTIMIZER not in name}
    return {dtype for dtype in found if dtype.is_floating_point}


def _model_state(
    model: MegatronModel, prefix: str = PREFIX, metadata: Mapping[str, bool] | None = None
) -> dict[str, Any]:
    (module,) = model.modules
    with cpu_tensors():
        return module.sharded_state_dict(prefix=prefix, metadata=dict(metadata or {}) or None)


@contextlib.contextmanager
def _told_as_user_error(directory: Path) -> Iterator[None]:
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with quietly():
            yield
    except (CheckpointingException, CheckpointException, FileNotFoundError, KeyError) as error:
        failures = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
        raise CheckpointError(
            f"{directory}: cannot be loaded as a Megatron checkpoint of this model: {[*failures, error][0]}. "
            "Name a checkpoint of a model of the same shape"
        ) from error


def _load(directory: Path, state: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    with _told_as_user_error(directory):
        loaded = dist_checkpointing.load(state, str(directory))
    assert isinstance(loaded, dict), "a strict load returns the state alone"
    return loaded


def _load_common(directory: Path) -> dict[str, Any]:
    """What does not differ between ranks."""
    from megatron.core import dist_checkpointing

    with _told_as_user_error(directory):
        return dist_checkpointing.load_common_state_dict(str(directory))


def _tensors(directory: Path) -> dict[str, Any]:
    """The tensors of a checkpoint, without their data."""
    from megatron.core import dist_checkpointing

    with _told_as_user_error(directory):
        return dist_checkpointing.load_tensors_metadata(str(directory))


def _set_weights(model: MegatronModel, state: dict[str, Any], prefix: str = PREFIX) -> None:
    (module,) = model.modules
    module.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()}, strict=True)


def _rng_state(runtime: MegatronRuntime) -> Any:
    """The generators of this rank; nothing in a worker draws from them today, dropout being 0."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if runtime.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(runtime.device)
    return ShardedObject("rng", state, (runtime.world_size,), (runtime.rank,), replica_id=0)


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
