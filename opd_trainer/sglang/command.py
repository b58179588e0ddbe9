"""The command line and environment of an SGLang server, with a GPU or without."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from opd_trainer.sglang.config import LaunchConfig

CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-overlap-schedule", "--disable-radix-cache", "--mem-fraction-static", "0.1", "--sleep-on-idle"),
)
"""What SGLang needs on a machine without a GPU. Its attention backend there knows no prefix cache, and its scheduler
spins on a core unless it may sleep."""
CPU_TOKENS = 20000
"""Cache of a server on CPU, tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Purpose:
    """What a server is for.

    Attributes:
        text: it takes text; requests of ours carry token ids only.
        releases_memory: it gives GPU memory back when asked.
        weights: the model's folder has weights; otherwise it waits for some that are sent.
    """

    text: bool = False
    releases_memory: bool = False
    weights: bool = True


def server_command(model: str, port: int, config: LaunchConfig, purpose: Purpose, *, gpu: bool) -> list[str]:
    """`python -m sglang.launch_server` for a Hugging Face folder."""
    command = [config.python or sys.executable, "-m", config.module, "--model-path", model]
    command += ["--host", config.host, "--port", str(port), "--dtype", config.dtype]
    if not purpose.text:
        command.append("--skip-tokenizer-init")
    command += ["--tp-size", str(config.tensor_parallel)]
    tokens = config.max_total_tokens
    if not gpu:
        command += CPU_FLAGS
        tokens = tokens or CPU_TOKENS
    elif config.deterministic:
        command.append("--enable-deterministic-inference")
    if purpose.releases_memory and gpu:
        # Without a GPU the library behind it cannot be loaded; there releasing is a matter of form.
        command.append("--enable-memory-saver")
    if not purpose.weights:
        command += ["--load-format", "dummy"]
    if tokens is not None:
        command += ["--max-total-tokens", str(tokens)]
    if config.memory_fraction is not None:
        command += ["--mem-fraction-static", str(config.memory_fraction)]
    return [*command, *config.args]


def server_environment(devices: Sequence[int], *, gpu: bool) -> dict[str, str]:
    """What is added to our own environment."""
    if not gpu:
        return {"SGLANG_USE_CPU_ENGINE": "1"}
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))} if devices else {}
