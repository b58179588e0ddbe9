"""Adam with fp32 main parameters on summed gradients, and the learning-rate schedule.

A worker's loss is a share of one global sum, so that gradients are summed over data-parallel ranks and never divided:
Megatron-core is told that the loss is per token (which switches its averaging off), and its division by the number of
tokens is left out.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opd_trainer.errors import TrainingDiverged
from opd_trainer.megatron.compat import cpu_tensors
from opd_trainer.megatron.config import MegatronConfig, OptimizerConfig, Schedule


def learning_rate(settings: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Warm-up reaches the peak with its last step; a decaying schedule starts from the peak after it, and is at `min_lr`
    from step `decay_steps` on.

    Args:
        settings: peak, shape and lengths.
        step: optimizer step, from 0.
        total_steps: the run's length, which `decay_steps` defaults to.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule is Schedule.constant:
        return settings.lr
    decay_steps = total_steps if settings.decay_steps is None else settings.decay_steps
    progress = min(1.0, (step - settings.warmup_steps) / max(1, decay_steps - settings.warmup_steps))
    share = 1 - progress if settings.schedule is Schedule.linear else (1 + math.cos(math.pi * progress)) / 2
    return settings.min_lr + share * (settings.lr - settings.min_lr)


def _finalize_gradients(model: list[Any], _num_tokens: Any, **options: Any) -> None:
    """Megatron's reduction of gradients over ranks, without its division by the number of tokens."""
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(model, None, **options)


def wrap(modules: Sequence[Any], settings: MegatronConfig) -> list[Any]:
    """Gives each model chunk its gradient buffer, all-reduced (or reduce-scattered) as a sum."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=settings.distributed_optimizer,
        overlap_grad_reduce=False,
    )
    wrapped = []
    for module in modules:
        config = copy.copy(module.config)
        config.calculate_per_token_loss = True
        config.finalize_model_grads_func = _finalize_gradients
        wrapped.append(DistributedDataParallel(config=config, ddp_config=ddp_config, module=module))
    return wrapped


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        grad_norm: global L2 norm before clipping.
        learning_rate: that it used.
    """

    grad_norm: float
    learning_rate: float


class Optimizer:
    """Megatron's Adam (plain, or sharded over data-parallel ranks) and its schedule.

    Args:
        chunks: of `wrap`.
        settings: optimizer settings and whether to shard.
        total_steps: the run's length.
        key: configuration key of the optimizer settings, for messages.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        settings: MegatronConfig,
        total_steps: int,
        *,
        key: str = "megatron.optimizer",
    ) -> None:
        from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
        from megatron.core.optimizer import get_megatron_optimizer

        self._settings, self._total_steps, self._key = settings.optimizer, total_steps, key
        self._chunks = list(chunks)
        dtype = next(p.dtype for p in chunks[0].parameters())
        config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.optimizer.lr,
            min_lr=settings.optimizer.min_lr,
            weight_decay=settings.optimizer.weight_decay,
            adam_beta1=settings.optimizer.beta1,
            adam_beta2=settings.optimizer.beta2,
            adam_eps=settings.optimizer.eps,
            clip_grad=settings.optimizer.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=settings.distributed_optimizer,
        )
        with cpu_tensors():
            self.megatron: Any = get_megatron_optimizer(config, self._chunks, use_gloo_process_groups=False)
        _fuse(self.megatron)
        self.num_steps = 0
        """Optimizer steps taken; the state of the schedule."""

    def zero_grad(self) -> None:
        """Clears gradients, before a forward and backward."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self) -> StepResult:
        """One step on the gradients in the buffers.

        Raises:
            TrainingDiverged: a gradient is not finite; the weights are then spoilt.
        """
        rate = learning_rate(self._settings, self.num_steps, self._total_steps)
        for group in self.megatron.param_groups:
            group["lr"] = rate
            group["weight_decay"] = self._settings.weight_decay * group["wd_mult"]
        with cpu_tensors():
            _, grad_norm, _ = self.megatron.step()
        if not math.isfinite(grad_norm):
            raise TrainingDiverged(
                f"optimizer step {self.num_steps}: the gradient's norm is {grad_norm}, at learning rate {rate:g}; the "
                f"loss was finite. Restart from the last checkpoint with a lower {self._key}.lr"
            )
        self.num_steps += 1
        return StepResult(float(grad_norm), rate)


def _fuse(megatron: Any) -> None:
    """Lets torch's Adam update a parameter in one kernel; by default it computes whole copies of all parameters on a
    GPU, and goes over each ten times on a CPU.

    Nothing changes where Apex or Transformer Engine bring an Adam of their own.
    """
    for group in megatron.param_groups:
        if "fused" in group:
            group["fused"], group["foreach"] = True, False


def has_gradient_buffers(module: nn.Module) -> bool:
    """Whether any parameter of a module could collect a gradient or has a place for one."""
    return any(p.requires_grad or p.grad is not None or hasattr(p, "main_grad") for p in module.parameters())
