"""How responses are generated."""

from dataclasses import dataclass, field
from enum import StrEnum, auto

from opd_trainer.sglang.config import LaunchConfig


class RolloutMode(StrEnum):
    """When the samples of a step are generated."""

    sync = auto()
    """Before its update, by the weights that it updates."""
    one_step_off = auto()
    """During the update of the step before, by the weights of that step."""


class ZeroStd(StrEnum):
    """What becomes of a group whose rewards are all the same, in which no response is better than another."""

    keep = auto()
    """It is learned from: a teacher and estimators without groups have something to say about it."""
    drop = auto()
    """It is left out of the step."""
    replace = auto()  # pyright: ignore[reportAssignmentType]  (hides a method of str that nobody calls on it)
    """It is left out, and other prompts are asked in its place (DAPO's dynamic sampling)."""


@dataclass(slots=True)
class FilterConfig:
    """Which of a step's samples are learned from; those left out are counted in rollout/filtered/*."""

    zero_std: ZeroStd = ZeroStd.keep
    """keep, drop or replace: what becomes of a group whose rewards are all the same."""
    max_rounds: int = 4
    """replace: rounds of generation in a step, the first included; groups that are missing then stay missing."""
    part: str | None = None
    """Part of a composite reward that tells whether rewards are the same; null compares the whole rewards."""
    mask_truncated: bool = False
    """No loss on responses that ran into `max_response_tokens`; their rewards still count in their groups (DAPO's
    overlong filtering)."""

    @property
    def used(self) -> bool:
        """Whether anything is filtered."""
        return self.zero_std is not ZeroStd.keep or self.mask_truncated

    @property
    def rounds(self) -> int:
        """Rounds of generation in a step, at most."""
        return self.max_rounds if self.zero_std is ZeroStd.replace else 1


@dataclass(slots=True)
class RolloutConfig:
    """What every engine is asked for; an engine's own settings are fields of its subclass."""

    prompts_per_step: int = 32
    """Prompts per training step."""
    samples_per_prompt: int = 4
    """Responses per prompt (the group of GRPO and its kin)."""
    max_prompt_tokens: int = 1024
    """Longest prompt, tokens."""
    max_response_tokens: int = 1024
    """Longest response, tokens."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are computed at the same temperature."""
    top_p: float = 1.0
    """Nucleus sampling: smallest set of tokens with this mass; 1 samples from all."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 samples from all."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end a response besides the model's own EOS tokens."""
    mode: RolloutMode = RolloutMode.sync
    """sync, or one_step_off: samples are generated while the student learns from those of the step before, one version
    behind it. The memory of both is needed at once where they share a device."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    """Which samples are learned from."""
    bucket_bytes: int = 268435456
    """Largest bucket of a weight sync, bytes."""


@dataclass(slots=True)
class EmbeddedRollout(RolloutConfig):
    """The engine in our own process: batched decoding with a preallocated KV cache."""

    batch_size: int = 256
    """Responses decoded at once."""
    kv_cache_bytes: int = 4294967296
    """Largest KV cache, bytes; fewer responses are decoded at once where `batch_size` of full length would not fit."""
    prefill_tokens: int = 8192
    """Prompt tokens (padding included) processed at once before decoding; bounds the memory of long prompts."""
    cuda_graphs: bool = True
    """On a GPU: decoding steps are captured and replayed, which saves most of their time while the batch is small. A
    mixture of experts does without."""


class SyncVia(StrEnum):
    """How weights reach SGLang servers."""

    tensor = auto()
    """Shared memory; the servers are on this machine."""
    distributed = auto()
    """A process group with each server: NCCL where both sides have GPUs, gloo otherwise."""
    disk = auto()
    """A folder that the servers can read."""


@dataclass(slots=True)
class SglangRollout(RolloutConfig):
    """SGLang servers: our own (`urls` empty) or somebody else's."""

    urls: list[str] = field(default_factory=list)
    """Base URLs of running servers of the student's architecture; empty launches our own."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """How our own are launched."""
    concurrency: int = 256
    """Requests under way at once, over all servers, >= 1."""
    timeout_s: float = 1800.0
    """Limit on one response, seconds."""
    attempts: int = 4
    """Tries of a request before its sample counts as dropped, >= 1."""
    straggler_after_s: float | None = None
    """Abort responses still unfinished so long after a step's generation began, seconds; null waits for all."""
    keep_partial: bool = False
    """Train on what an aborted response had so far, as a truncated one; otherwise its sample is dropped."""
    max_failed_fraction: float = 0.2
    """Largest fraction of a step's requests that servers may fail to answer before the run stops."""
    sync_via: SyncVia = SyncVia.tensor
    """tensor, distributed or disk."""
    sync_timeout_s: float = 300.0
    """Limit on each call of a weight sync, seconds."""
    max_parity_gap: float | None = 0.2
    """Largest mean difference between log-probs of servers and trainer after the first weight sync, nats; the run stops
    beyond it. null does not look."""
    release_memory: bool = False
    """Servers on the trainer's own GPUs: they give weights and cache back while the student trains (SGLang's memory
    saver, which needs torch_memory_saver beside sglang; servers at `urls` must run with --enable-memory-saver)."""
    sync_dir: str | None = None
    """disk: folder that the servers can read too; null takes one inside the run directory."""
