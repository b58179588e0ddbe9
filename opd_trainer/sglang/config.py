"""Settings of SGLang servers that we launch ourselves."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class LaunchConfig:
    """How SGLang servers are launched; only for servers that are ours."""

    python: str | None = None
    """Python that has sglang, as it pins a torch of its own; null means the one that runs the trainer."""
    module: str = "sglang.launch_server"
    """Module that is run with `python -m`; opd_trainer.sglang.fake answers alike without SGLang, for tests."""
    servers: int = 1
    """Servers to launch; requests are spread over them, >= 1."""
    tensor_parallel: int = 1
    """GPUs per server, >= 1."""
    devices: list[int] = field(default_factory=list)
    """GPUs to hand out, `tensor_parallel` to each server in turn; empty leaves the choice to SGLang."""
    host: str = "127.0.0.1"
    """Address that servers listen on."""
    port: int | None = None
    """Port of the first server, others follow; null takes free ones."""
    dtype: str = "auto"
    """Number format of the weights: auto (the model's own), bfloat16, float16 or float32."""
    memory_fraction: float | None = None
    """Share of a GPU's memory for weights and cache, 0..1; null leaves it to SGLang."""
    max_total_tokens: int | None = None
    """Tokens in the cache of one server; null leaves it to SGLang (on CPU: 20000)."""
    deterministic: bool = True
    """Make a sample depend on its request and the weights alone (deterministic inference); slower. GPU only."""
    start_timeout_s: float = 900.0
    """Limit on loading the model, seconds."""
    hang_after_s: float = 300.0
    """A server that has not answered for so long counts as dead, and is killed, seconds."""
    max_restarts: int = 3
    """How often each server is started again after it died, >= 0."""
    args: list[str] = field(default_factory=list)
    """More arguments of `python -m sglang.launch_server`, one list entry each; they come last and win."""
