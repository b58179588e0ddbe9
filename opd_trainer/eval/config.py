"""Evaluation on held-out prompts."""

from dataclasses import dataclass, field

from opd_trainer.data.config import DataConfig


@dataclass(slots=True)
class EvalConfig:
    """What is evaluated, when and how."""

    every: int = 0
    """Evaluate every so many steps besides before and after; 0 only before and after."""
    datasets: dict[str, DataConfig] = field(default_factory=dict)
    """Named held-out datasets."""
    n_prompts: int | None = None
    """Prompts of each dataset that are used, from its start; null takes all."""
    allow_trained_on: bool = False
    """Accept held-out prompts that are also trained on, whose accuracy is not that of unseen problems; false refuses
    them."""
    samples_per_prompt: int = 1
    """Responses per prompt; pass@k is reported for k = 1, 2, 4, ... up to this."""
    correct_above: float = 0.5
    """A response counts as correct when its reward is larger than this."""
    correct_part: str | None = None
    """Part of a composite reward that tells whether a response is correct; null takes the whole reward."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling: smallest set of tokens with this mass; 1 samples from all."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 samples from all."""
    max_response_tokens: int | None = None
    """Longest response; null takes the rollout's."""
    teacher: bool = True
    """Evaluate a Megatron teacher once as well, with an engine of its own."""
    reverse_kl_prompts: int = 64
    """Held-out prompts for the reverse KL before and after, measured on samples of the student; 0 for none."""
    reference_key: str | None = None
    """Column of the held-out datasets with a reference response (their label column, or another one): the negative
    log-likelihood that the student and an inline teacher give it is measured, nats per token, at
    `rollout.temperature`; null measures none."""
