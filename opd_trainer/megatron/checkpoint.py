"""Megatron torch_dist checkpoints: weights, optimizer, schedule and RNG, bit-exact on resume; or weights alone.

A checkpoint is one directory. The worker adds the model's Hugging Face config.json and tokenizer to it, so that it can
be loaded as a model without anything else.
"""

import contextlib
import copy
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from opd_trainer.errors import CheckpointError
from opd_trainer.megatron.build import MegatronModel
from opd_trainer.megatron.compat import cpu_tensors, inline_checkpoint_writer
from opd_trainer.megatron.optimizer import Optimizer
from opd_trainer.megatron.runtime import MegatronRuntime

FORMAT = "torch_dist"
HEAD = "output_layer."

_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""The one format of the sharded optimizer that restores every element and fits any parallel layout."""


def save(directory: Path, model: MegatronModel, optimizer: Optimizer) -> None:
    """Writes the training state into `directory`, which exists and holds no checkpoint; collective."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    state = _training_state(model, optimizer, is_loading=False)
    strategy = TorchDistSaveShardedStrategy(FORMAT, 1, thread_count=1)
    with _quietly(), inline_checkpoint_writer():
        dist_checkpointing.save(state, str(directory), strategy)


def restore(directory: Path, model: MegatronModel, optimizer: Optimizer) -> None:
    """The inverse of `save`; collective. The random state is restored when as many workers save and restore.

    Raises:
        CheckpointError: `directory` holds no training state of this model.
    """
    _init_adam(optimizer)
    wanted = _training_state(model, optimizer, is_loading=True)
    same_layout = _load_common(directory)["world_size"] == model.runtime.world_size
    if not same_layout:
        del wanted["rng"]
    state = _load(directory, wanted)
    _set_weights(model, state["model"])
    with cpu_tensors():
        _set_optimizer(optimizer, state["optimizer"])
    optimizer.num_steps = state["num_steps"]
    if same_layout:
        _set_rng(state["rng"])


def load_weights(model: MegatronModel, directory: Path, *, with_head: bool = True) -> None:
    """Fills a model, of any parallel layout, from a checkpoint; collective.

    Args:
        model: to fill.
        directory: of the checkpoint.
        with_head: False leaves the model's output head as it is; the checkpoint may hold another one.

    Raises:
        CheckpointError: `directory` holds no weights of this model.
    """
    (module,) = model.modules
    wanted, kept = _model_state(model), {}
    if not with_head:
        kept = {f"model.{name}": value for name, value in module.state_dict().items() if name.startswith(HEAD)}
        wanted = {name: value for name, value in wanted.items() if not name.startswith(f"model.{HEAD}")}
    state = _load(directory, {"model": wanted})
    _set_weights(model, {**state["model"], **kept})


def _model_state(model: MegatronModel) -> dict[str, Any]:
    (module,) = model.modules
    with cpu_tensors():
        return module.sharded_state_dict(prefix="model.")


def _training_state(model: MegatronModel, optimizer: Optimizer, *, is_loading: bool) -> dict[str, Any]:
    weights = _model_state(model)
    with cpu_tensors():
        optimizer_state = optimizer.megatron.sharded_state_dict(
            copy.copy(weights), is_loading=is_loading, metadata=_OPTIMIZER_METADATA
        )
    return {
        "model": weights,
        "optimizer": optimizer_state,
        "num_steps": optimizer.num_steps,
        "world_size": model.runtime.world_size,
        "rng": _rng_state(model.runtime),
    }


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Lets Megatron read or write files, without the warnings of torch that only Megatron's authors can act on."""
    with warnings.catch_warnings(), cpu_tensors():
        warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
        yield


@contextlib.contextmanager
def _told_as_user_error(directory: Path) -> Iterator[None]:
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with _quietly():
            yield
    except (CheckpointingException, CheckpointException, FileNotFoundError, KeyError) as error:
        failures = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
        raise CheckpointError(
            f"{directory}: cannot be loaded as a Megatron checkpoint of this model: {[*failures, error][0]}. "
            "Name a directory that this trainer wrote, for a model of the same shape"
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


def _set_weights(model: MegatronModel, state: dict[str, Any]) -> None:
    (module,) = model.modules
    module.load_state_dict({name.removeprefix("model."): value for name, value in state.items()}, strict=True)


def _inner_optimizers(optimizer: Optimizer) -> list[Any]:
    return [megatron for megatron in optimizer.megatron.chained_optimizers if not megatron.is_stub_optimizer]


def _init_adam(optimizer: Optimizer) -> None:
    """Allocates the state that is about to be loaded; Megatron's own allocation leaves torch's `step` out."""
    for megatron in _inner_optimizers(optimizer):
        inner = megatron.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                if isinstance(inner, torch.optim.AdamW):
                    state["step"] = torch.zeros(())
                inner.state[parameter] = state


def _set_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    # The sharded optimizer expects nothing but moments where torch's Adam also keeps `step`, and gives all parameters
    # the same `step` tensor, which Adam counts up in place for each of them: load in two halves, with `step` set aside.
    sharded = state.pop("param_state", None)
    state.pop("param_state_sharding_type", None)
    optimizer.megatron.load_state_dict(state)
    if sharded is None:
        return
    (megatron,) = _inner_optimizers(optimizer)
    inner = megatron.optimizer.state
    steps = {parameter: values.pop("step") for parameter, values in inner.items() if "step" in values}
    megatron.load_parameter_state_from_fully_reshardable(sharded)
    for parameter, step in steps.items():
        inner[parameter]["step"] = step.clone()


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
