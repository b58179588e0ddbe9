"""Every hack that Megatron-core needs, most of them on a machine without a GPU, where alone they are active.

Remove an entry once the oldest Megatron-core that we support no longer needs it. The code that they change is at
https://github.com/NVIDIA/Megatron-LM/tree/core_v0.16.1/megatron/core, under the names of modules below.

Version range of all: 0.16.
"""

import contextlib
import inspect
import queue
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_FOREACH: Any = torch
"""Functions on lists of tensors have a leading underscore, though they are documented."""


def has_gpu() -> bool:
    """Whether torch can use a CUDA device."""
    return torch.cuda.is_available()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Around the first import of Megatron-core, which warns a dozen times that optional packages are not there, and
    around construction, which warns of a deprecated setting that it makes itself.

    Remove when: Megatron-core warns only of what was asked for.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Around the first import of Megatron-core: leaves what it decorates with `torch.compile` as it is; a no-op with a
    GPU.

    Symptom: `megatron.core.jit` compiles small functions, none of which our settings use, while modules are imported;
    that loads Inductor and doubles the time of the import (3.3 instead of 1.5 seconds of a processor, in every worker).
    Remove when: megatron.core.jit compiles when a function is called first, or can be told not to.
    """
    if has_gpu():
        yield
        return

    def as_it_is(model: Any = None, **_settings: Any) -> Any:
        return (lambda decorated: decorated) if model is None else model

    with contextlib.ExitStack() as stack:
        _replace(stack, torch, {"compile": as_it_is})
        yield


@contextlib.contextmanager
def without_wandb() -> Iterator[None]:
    """Around the first import of Megatron-core: it does not find wandb, unless that is loaded already.

    Symptom: `dynamic_context.py` imports wandb for a log of its own that we do not use: 0.3 seconds of a processor in
    every worker, and two folders in the temporary directory that a worker leaves when it is killed.
    Remove when: Megatron-core imports wandb where it writes to it.
    """
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = cast(Any, None)
    try:
        yield
    finally:
        del sys.modules["wandb"]


class _Cpu(TorchFunctionMode):
    """Answers Megatron's questions for CUDA tensors with CPU tensors.

    Symptoms: optimizer construction and gradient clipping allocate with `device="cuda"`; the optimizer sorts parameters
    by `tensor.type()` and knows only the CUDA types; the tied embedding of a pipeline is moved with `.cuda()`.
    Remove when: megatron.core.optimizer and language_module take the device from their tensors.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs `func` with every CUDA device replaced."""
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return func(*args, **kwargs)


def cpu_tensors() -> contextlib.AbstractContextManager[Any]:
    """Let Megatron take CPU tensors for CUDA tensors inside; a no-op with a GPU.

    Slows every torch function down: use it around construction, optimizer steps and checkpoints, not around a forward.
    """
    return contextlib.nullcontext() if has_gpu() else _Cpu()


class _TorchOnCpu(ModuleType):
    """The torch module, seen by one Megatron module, with `zeros(device="cuda")` on the CPU.

    Symptom: `schedules.py` counts tokens in `torch.zeros([], device="cuda")` on each call; `_Cpu` would have to
    surround the whole forward and backward for it.
    Remove when: megatron.core.pipeline_parallel.schedules no longer names the device.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, **kwargs: Any) -> torch.Tensor:
        """`torch.zeros` on the CPU."""
        return torch.zeros(*size, **{**kwargs, "device": CPU})


@contextlib.contextmanager
def cpu_compat() -> Iterator[None]:
    """Makes Megatron-core run without a GPU inside, and undoes all of it on exit; a no-op with a GPU.

    Symptoms: Megatron passes the result of `torch.cuda.current_device()` as a device, calls
    `torch.cuda.synchronize()` around pipeline communication, and saves and restores CUDA's generator around
    activations that it computes anew; all raise without CUDA.
    Remove when: Megatron-core asks torch.accelerator or its process groups for the device.
    """
    if has_gpu():
        yield
        return
    with quiet():
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.tensor_parallel import random

    with contextlib.ExitStack() as stack:
        _replace(stack, torch.cuda, {"current_device": lambda: CPU, "synchronize": lambda device=None: None})
        _replace(stack, schedules, {"torch": _TorchOnCpu("torch")})
        no_state = {"_get_cuda_rng_state": lambda **_: None, "_set_cuda_rng_state": lambda *_, **__: None}
        _replace(stack, random, no_state)
        yield


@contextlib.contextmanager
def router_without_transformer_engine() -> Iterator[None]:
    """Lets the router of a mixture of experts run where Transformer Engine is not installed, with or without a GPU.

    Symptom: `moe_utils.py` compares `te_general_gemm` with None, but defines it only where Transformer Engine is there.
    Remove when: megatron.core.transformer.moe.moe_utils defines it in any case.
    """
    with quiet():
        from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "te_general_gemm"):
        yield
        return
    setattr(moe_utils, "te_general_gemm", None)  # noqa: B010  (pyright knows no such name)
    try:
        yield
    finally:
        delattr(moe_utils, "te_general_gemm")


def _norm(_chunk: int, _flag: Tensor, tensors: list[list[Tensor]], _each: bool, *_: Any) -> tuple[Tensor, None]:
    """The L2 norm f32[1] of all tensors together."""
    return torch.stack(_FOREACH._foreach_norm(tensors[0])).norm()[None], None


def _scale(_chunk: int, _flag: Tensor, tensors: list[list[Tensor]], factor: float) -> None:
    """The first tensors times a factor, written to the second ones, which Megatron makes the same."""
    assert all(source is target for source, target in zip(*tensors, strict=True))
    _FOREACH._foreach_mul_(tensors[1], factor)


@contextlib.contextmanager
def gradients_at_once() -> Iterator[None]:
    """Clips gradients in a few kernels where there is a GPU and neither Transformer Engine nor Apex.

    Symptom: Megatron's own substitutes wait for the device once for each parameter, and launch two kernels for each.
    Remove when: megatron.core.utils computes the norm without waiting.
    """
    with quiet():
        from megatron.core import utils
        from megatron.core.optimizer import clip_grads

    own = {"l2_norm_impl": "local_multi_tensor_l2_norm", "multi_tensor_scale_impl": "local_multi_tensor_scale"}
    substitutes = all(getattr(clip_grads, name, None) is getattr(utils, local) for name, local in own.items())
    with contextlib.ExitStack() as stack:
        if has_gpu() and substitutes:
            _replace(stack, clip_grads, {"l2_norm_impl": _norm, "multi_tensor_scale_impl": _scale})
        yield


@contextlib.contextmanager
def inline_checkpoint_writer() -> Iterator[None]:
    """Makes Megatron write checkpoints in the process that saves, with or without a GPU.

    Symptoms: each save forks writers, and the first one spawns a server that stays for the life of the process and runs
    the main script once more; neither may be started from a daemonic process, and the fork hangs with some threads.
    Remove when: torch_dist has a synchronous writer.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync

    def write(transforms: Any, _use_msc: bool, _rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
        written: dict[int, Any] = {}
        for index, bucket in enumerate(buckets):
            done: queue.Queue[Any] = queue.Queue()
            count: Any = queue.Queue()
            count.put(index)
            writer.write_preloaded_data(transforms, index, bucket, cast(Any, done), count, use_fsync=True)
            _, outcome = done.get()
            if isinstance(outcome, Exception):
                results.put(outcome)
                return
            written[index] = outcome
        results.put(written)

    with contextlib.ExitStack() as stack:
        _replace(stack, filesystem_async, {"_results_queue": queue.Queue()})
        _replace(stack, writer, {"write_preloaded_data_multiproc": staticmethod(write)})
        yield


def _replace(stack: contextlib.ExitStack, owner: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        stack.callback(setattr, owner, name, inspect.getattr_static(owner, name))
        setattr(owner, name, value)
