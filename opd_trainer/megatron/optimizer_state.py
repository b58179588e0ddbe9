"""The optimizer's part of a checkpoint: moments and main parameters by the name of their weight, whoever holds them.

Megatron's optimizers wrap these tensors in dictionaries whose shape depends on the layout (with shared experts there
are two optimizers on a rank) and on the kind (plain or sharded). Only the tensors and the number of steps are taken
from a checkpoint; the dictionaries around them are those of the optimizer that takes them, like its hyper-parameters.
"""

import copy
from collections.abc import Iterator, Set
from typing import Any

import torch

from opd_trainer.megatron.optimizer import Optimizer

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""The one format of the sharded optimizer that restores every element and fits any parallel layout."""

_STATE = "optimizer.state."
_SHARDED_MAIN = f"{_STATE}param."
"""fp32 main parameters of the sharded optimizer, which has them for fp32 weights too."""
_PLAIN_MAIN = f"{_STATE}fp32_param."
"""Those of the plain optimizer, for 16-bit weights."""


def sharded_state(optimizer: Optimizer, weights: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint gets of an optimizer; collective.

    Args:
        optimizer: whose state.
        weights: the model's sharded state.
    """
    return optimizer.megatron.sharded_state_dict(copy.copy(weights), is_loading=False, metadata=_METADATA)


def wanted_state(optimizer: Optimizer, weights: dict[str, Any], available: Set[str]) -> dict[str, Any]:
    """What an optimizer wants of a checkpoint; collective. Allocates the state that is about to be loaded.

    Args:
        optimizer: that is going to take it.
        weights: the model's sharded state.
        available: names of the tensors in the checkpoint.
    """
    _init_adam(optimizer)
    state = optimizer.megatron.sharded_state_dict(copy.copy(weights), is_loading=True, metadata=_METADATA)
    for tensor in _leaves(state):
        tensor.key = _key(tensor.key, available)
    return state


def set_state(optimizer: Optimizer, wanted: dict[str, Any], loaded: dict[str, Any], num_steps: int) -> None:
    """Gives an optimizer what it wanted.

    Args:
        optimizer: a fresh one.
        wanted: a copy of what `wanted_state` gave, made by `copy_of` before loading, which changes it.
        loaded: what came in its place, among other things.
        num_steps: optimizer steps behind the state.
    """
    state = _overlay(wanted, loaded)
    every = optimizer.megatron.chained_optimizers
    for number, megatron in enumerate(every):
        if not megatron.is_stub_optimizer:
            _set_one(megatron, state if len(every) == 1 else state[number], num_steps)
    optimizer.num_steps = num_steps


def copy_of(state: Any) -> Any:
    """A copy of nested dictionaries and lists that shares what they hold."""
    if isinstance(state, dict):
        return {key: copy_of(value) for key, value in state.items()}
    return [copy_of(value) for value in state] if isinstance(state, list) else state


def _key(name: str, available: Set[str]) -> str:
    """The name in the checkpoint of a tensor that an optimizer of the other kind may have written."""
    for prefix in (_SHARDED_MAIN, _PLAIN_MAIN):
        if name.startswith(prefix) and name not in available:
            weight = name.removeprefix(prefix)
            return next(
                (other for other in (_SHARDED_MAIN + weight, _PLAIN_MAIN + weight) if other in available), weight
            )
    return name


def _is_sharded(value: Any) -> bool:
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    return isinstance(value, ShardedBase)


def _leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _leaves(value)
    elif _is_sharded(state):
        yield state


def _overlay(wanted: Any, loaded: Any) -> Any:
    """`wanted` with what was loaded in place of its sharded tensors."""
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

    if _is_sharded(wanted):
        return loaded
    if isinstance(wanted, dict):
        return {key: _overlay(value, loaded[key] if _any_sharded(value) else None) for key, value in wanted.items()}
    if isinstance(wanted, list):
        return [_overlay(value, loaded[i] if _any_sharded(value) else None) for i, value in enumerate(wanted)]
    return wanted.unwrap() if isinstance(wanted, LocalNonpersistentObject) else wanted


def _any_sharded(value: Any) -> bool:
    return next(_leaves(value), None) is not None


def _inner(megatron: Any) -> torch.optim.Optimizer:
    return megatron.optimizer


def _init_adam(optimizer: Optimizer) -> None:
    """Allocates moments and counters; Megatron's own allocation leaves torch's `step` out."""
    for megatron in optimizer.megatron.chained_optimizers:
        if megatron.is_stub_optimizer:
            continue
        inner = _inner(megatron)
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                if isinstance(inner, torch.optim.AdamW):
                    state["step"] = torch.zeros(())
                inner.state[parameter] = state


def _set_one(megatron: Any, state: dict[str, Any], num_steps: int) -> None:
    # The sharded optimizer expects nothing but moments where torch's Adam also keeps `step`, and gives all parameters
    # the same `step` tensor, which Adam counts up in place for each of them: load in two halves, with `step` set aside.
    sharded = state.pop("param_state", None)
    state.pop("param_state_sharding_type", None)
    adam = state.get("optimizer", state)
    if "state" in adam and isinstance(_inner(megatron), torch.optim.AdamW):
        adam["state"]["common_step"] = torch.tensor(float(num_steps))
    else:
        adam["param_groups"] = [{**group, "step": num_steps} for group in adam["param_groups"]]
    megatron.load_state_dict(state)
    if sharded is None:
        return
    inner = _inner(megatron).state
    steps = {parameter: values.pop("step") for parameter, values in inner.items() if "step" in values}
    megatron.load_parameter_state_from_fully_reshardable(sharded)
    for parameter, step in steps.items():
        inner[parameter]["step"] = step.clone()
