"""One process's place among the Megatron workers: process groups, device, seeds, and a complete teardown."""

import contextlib
import gc
import random
import sys
import warnings
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from opd_trainer.errors import ConfigError, OpdError
from opd_trainer.megatron.compat import (
    CPU,
    cpu_compat,
    gradients_at_once,
    has_gpu,
    quiet,
    router_without_transformer_engine,
    uncompiled,
    without_wandb,
)
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.layout import layout_problems, model_parallel_size


class MegatronRuntime:
    """torch.distributed and Megatron's parallel state, from `start` to `close`.

    A process has at most one at a time, any number of them one after the other.
    """

    def __init__(self, rank: int, world_size: int, rendezvous: str, settings: MegatronConfig, seed: int) -> None:
        """Allocates nothing.

        Args:
            rank: of this process, from 0.
            world_size: number of processes.
            rendezvous: where they meet: ``file:///path/of/a/new/file`` or ``tcp://host:port``.
            settings: parallel sizes and the timeout of collectives.
            seed: of torch's and Python's generators; the same on every rank.

        Raises:
            ConfigError: the parallel sizes do not divide the number of processes, or contradict each other.
        """
        problems = layout_problems(settings, world_size)
        if problems:
            raise ConfigError(problems)
        self._rank = rank
        self._world_size = world_size
        self._rendezvous = rendezvous
        self._settings = settings
        self._seed = seed
        self._stack: contextlib.ExitStack | None = None
        self.device = CPU

    def start(self) -> None:
        """Joins the other processes and builds Megatron's groups.

        Raises:
            OpdError: this process already has a runtime.
        """
        if self._stack is not None or distributed.is_initialized():
            raise OpdError("this process already has a Megatron runtime: close it before starting another")
        with contextlib.ExitStack() as stack:
            self._join(stack)
            self._stack = stack.pop_all()

    def _join(self, stack: contextlib.ExitStack) -> None:
        with quiet(), uncompiled(), without_wandb():
            from megatron.core import parallel_state
            from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed

        stack.enter_context(cpu_compat())
        stack.enter_context(router_without_transformer_engine())
        stack.enter_context(gradients_at_once())
        timeout = timedelta(seconds=self._settings.timeout_s)
        if has_gpu():
            self.device = torch.device("cuda", self._rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
            # That device is the right one. To say so by `device_id` would also connect every group that Megatron makes
            # at once, used or not, each with buffers of its own on the device.
            warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
        # torch puts a hook of its own around the one that is there, and leaves it.
        stack.callback(setattr, sys, "excepthook", sys.excepthook)
        distributed.init_process_group(
            backend="nccl" if has_gpu() else "gloo",
            init_method=self._rendezvous,
            rank=self._rank,
            world_size=self._world_size,
            timeout=timeout,
        )
        stack.callback(distributed.destroy_process_group)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self._settings.tensor_parallel,
            pipeline_model_parallel_size=self._settings.pipeline_parallel,
            context_parallel_size=self._settings.context_parallel,
            expert_model_parallel_size=self._settings.expert_parallel,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=max(1, round(self._settings.timeout_s / 60)),
        )
        stack.callback(parallel_state.destroy_model_parallel)
        # The tracker for inference is the one that never touches CUDA's generators; dropout is 0 everywhere, so that
        # nothing draws from it.
        initialize_rng_tracker(inference_rng_tracker=not has_gpu(), force_reset=True)
        stack.callback(initialize_rng_tracker, inference_rng_tracker=True, force_reset=True)
        random.seed(self._seed)
        torch.manual_seed(self._seed)
        if has_gpu():
            model_parallel_cuda_manual_seed(self._seed)

    def close(self) -> None:
        """Destroys the groups and undoes every patch. Safe to call twice."""
        stack, self._stack = self._stack, None
        if stack is None:
            return
        stack.close()
        # Megatron's modules refer to each other in cycles. Until these are collected, their groups keep their threads
        # (each of gloo's wakes a hundred times a second) and their weights keep the device's memory.
        gc.collect()
        if has_gpu():
            torch.cuda.empty_cache()

    @property
    def rank(self) -> int:
        """Of this process among all."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._world_size

    @property
    def settings(self) -> MegatronConfig:
        """What it was built from."""
        return self._settings

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self._seed

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks."""
        return self._settings.tensor_parallel

    @property
    def tp_rank(self) -> int:
        """Tensor-parallel rank."""
        return distributed.get_rank(self.tp_group)

    @property
    def tp_group(self) -> ProcessGroup:
        """Ranks that share each layer's matrices."""
        return _groups().get_tensor_model_parallel_group()

    @property
    def pp_size(self) -> int:
        """Pipeline stages."""
        return self._settings.pipeline_parallel

    @property
    def pp_rank(self) -> int:
        """This process's pipeline stage."""
        return distributed.get_rank(self.pp_group)

    @property
    def pp_group(self) -> ProcessGroup:
        """Ranks that share the layers."""
        return _groups().get_pipeline_model_parallel_group()

    @property
    def is_first_stage(self) -> bool:
        """Whether this process has the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process has the output head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def cp_size(self) -> int:
        """Ranks that share each sequence."""
        return self._settings.context_parallel

    @property
    def cp_rank(self) -> int:
        """Rank among those that share each sequence."""
        return distributed.get_rank(self.cp_group)

    @property
    def cp_group(self) -> ProcessGroup:
        """Ranks that share each sequence."""
        return _groups().get_context_parallel_group()

    @property
    def ep_size(self) -> int:
        """Ranks that share the experts."""
        return self._settings.expert_parallel

    @property
    def ep_rank(self) -> int:
        """Rank among those that share the experts."""
        return distributed.get_rank(self.ep_group)

    @property
    def ep_group(self) -> ProcessGroup:
        """Ranks that share the experts: neighbours in a pipeline stage, over tensor, context and data parallelism."""
        return _groups().get_expert_model_parallel_group()

    @property
    def dp_size(self) -> int:
        """Replicas of the model."""
        return self._world_size // model_parallel_size(self._settings)

    @property
    def dp_rank(self) -> int:
        """This process's replica."""
        return distributed.get_rank(self.dp_group)

    @property
    def dp_group(self) -> ProcessGroup:
        """Ranks that hold the same shard in different replicas."""
        return _groups().get_data_parallel_group()


def _groups() -> Any:
    """Megatron's module of process groups; untyped, because it types each of them as "a group, or something else"."""
    from megatron.core import parallel_state

    return parallel_state
