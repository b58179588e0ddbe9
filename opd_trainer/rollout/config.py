"""How responses are generated."""

from dataclasses import dataclass, field


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
    check_log_probs: bool = False
    """Compare engine and trainer log-probs after every weight sync (always done at step 0)."""
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
