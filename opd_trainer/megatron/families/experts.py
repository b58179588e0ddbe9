"""Mixtures of experts: their shape, and the way between both sets of names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_trainer.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The feed-forward layers of a mixture of experts; every layer has one.

    Attributes:
        count: experts of a layer.
        per_token: experts that compute a token: those with the largest router probabilities.
        intermediate_size: width of an expert's SwiGLU hidden layer.
        normalize: whether the probabilities of a token's experts are divided by their sum.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalize: bool


_REQUIRED = ("num_experts_per_tok", "moe_intermediate_size")


def experts_from_hf(config: Mapping[str, Any]) -> Experts:
    """Reads a Hugging Face config.

    Raises:
        CheckpointError: a key is missing.
    """
    # transformers 5 writes num_local_experts where everybody else has num_experts.
    count = config.get("num_experts", config.get("num_local_experts"))
    missing = [key for key in _REQUIRED if key not in config] + ([] if count else ["num_experts"])
    if missing:
        raise CheckpointError(
            f"config.json: {', '.join(missing)} missing: the experts' shape is unknown without. "
            f"Download the model's own config.json again"
        )
    return Experts(
        count=count,
        per_token=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        normalize=config.get("norm_topk_prob", False),
    )


def experts_to_hf(experts: Experts) -> dict[str, Any]:
    """The inverse of `experts_from_hf`."""
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalize,
    }
