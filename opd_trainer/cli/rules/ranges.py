"""Numbers that have a smallest sensible value."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from opd_trainer.cli.named import Named
from opd_trainer.cli.rules.common import Rule
from opd_trainer.config import Config
from opd_trainer.errors import Problem
from opd_trainer.task.config import SftTask


def numbers_are_numbers(config: Config, named: Named) -> Iterator[Problem]:
    """`nan` is a number for YAML and for Python; it would pass every other rule."""
    for key, value in _leaves(config, ""):
        if isinstance(value, float) and math.isnan(value):
            yield Problem(key, "nan", "it is not a number", f"Set {key} to one, or drop it")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value of the configuration with its dotted key."""
    if dataclasses.is_dataclass(value):
        inner: list[tuple[str, Any]] = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        inner = [(str(name), item) for name, item in value.items()]
    else:
        yield key, value
        return
    for name, item in inner:
        yield from _leaves(item, f"{key}.{name}" if key else name)


def ranges(config: Config, named: Named) -> Iterator[Problem]:
    """Numbers that have a smallest sensible value."""
    rollout, layout = config.rollout, config.megatron
    at_least: list[tuple[str, float, float]] = [
        ("steps", config.steps, 0),
        ("checkpoint.every", config.checkpoint.every, 0),
        ("checkpoint.keep", config.checkpoint.keep, 1),
        ("rollout.prompts_per_step", rollout.prompts_per_step, 1),
        ("rollout.samples_per_prompt", rollout.samples_per_prompt, 1),
        ("rollout.max_prompt_tokens", rollout.max_prompt_tokens, 1),
        ("rollout.max_response_tokens", rollout.max_response_tokens, 1),
        ("rollout.top_k", rollout.top_k, 0),
        ("rollout.filter.max_rounds", rollout.filter.max_rounds, 1),
        ("rollout.bucket_bytes", rollout.bucket_bytes, 1),
        ("megatron.tensor_parallel", layout.tensor_parallel, 1),
        ("megatron.pipeline_parallel", layout.pipeline_parallel, 1),
        ("megatron.context_parallel", layout.context_parallel, 1),
        ("megatron.expert_parallel", layout.expert_parallel, 1),
        ("megatron.max_tokens_per_device", layout.max_tokens_per_device, 1),
        ("megatron.log_prob_chunk_tokens", layout.log_prob_chunk_tokens, 1),
        *(
            (f"{owner}.optimizer.{name}", getattr(optimizer, name), 0)
            for owner, optimizer in (("megatron", layout.optimizer), ("critic", config.critic.optimizer))
            for name in ("lr", "weight_decay", "warmup_steps", "clip_grad")
        ),
        ("opd.kl_coef", config.opd.kl_coef, 0),
        ("reference.kl_coef", config.reference.kl_coef, 0),
        ("eval.every", config.eval.every, 0),
        ("eval.reverse_kl_prompts", config.eval.reverse_kl_prompts, 0),
        ("eval.samples_per_prompt", config.eval.samples_per_prompt, 1),
        ("eval.temperature", config.eval.temperature, 0),
        ("eval.top_k", config.eval.top_k, 0),
    ]
    optional = [
        ("eval.n_prompts", config.eval.n_prompts),
        ("eval.max_response_tokens", config.eval.max_response_tokens),
    ]
    at_least += [(key, value, 1) for key, value in optional if value is not None]
    if isinstance(config.task, SftTask):
        at_least.append(("task.batch_size", config.task.batch_size, 1))
    for key, value, smallest in at_least:
        if not value >= smallest:
            yield Problem(
                key, str(value), f"the smallest value that makes sense is {smallest}", f"Set {key}={smallest} or more"
            )
    for key, value in (("rollout.top_p", rollout.top_p), ("eval.top_p", config.eval.top_p)):
        if not 0 < value <= 1:
            yield Problem(key, str(value), "it is a probability mass in (0, 1]", f"Set {key}=1.0")


ALWAYS: tuple[Rule, ...] = (ranges,)
CONVERTING: tuple[Rule, ...] = (ranges,)
