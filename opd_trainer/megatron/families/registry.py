"""The families that we build, and the way from a configuration or a checkpoint to an architecture."""

from collections.abc import Mapping
from typing import Any

from opd_trainer.errors import CheckpointError
from opd_trainer.megatron.families.base import Architecture, ModelFamily
from opd_trainer.megatron.families.experts import Experts
from opd_trainer.megatron.families.llama import LLAMA
from opd_trainer.megatron.families.qwen2 import QWEN2
from opd_trainer.megatron.families.qwen3 import QWEN3
from opd_trainer.megatron.families.qwen3_moe import QWEN3_MOE
from opd_trainer.model.config import ArchitectureConfig, ExpertsConfig, Family

FAMILIES: Mapping[Family, ModelFamily] = {
    Family.llama: LLAMA,
    Family.qwen2: QWEN2,
    Family.qwen3: QWEN3,
    Family.qwen3_moe: QWEN3_MOE,
}


def architecture_from_hf(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a Hugging Face config.json describes.

    Raises:
        CheckpointError: the model type is not one of ours, or the config asks for something that we do not build.
    """
    model_type = config.get("model_type")
    for family in FAMILIES.values():
        if family.model_type == model_type:
            return family.architecture(config)
    known = ", ".join(family.model_type for family in FAMILIES.values())
    raise CheckpointError(
        f"config.json: model_type is {model_type!r}: Megatron models are built for {known}. "
        f"Use one of these, score the model on a server with opd=sglang, or add its family (docs/extending.md)"
    )


def architecture_from_config(config: ArchitectureConfig, vocab_size: int) -> Architecture:
    """The architecture of a model trained from scratch, for a tokenizer with `vocab_size` ids."""
    family = FAMILIES[config.family]
    return Architecture(
        family=family.name,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        experts=_experts(config.experts) if family.has_experts else None,
        vocab_size=vocab_size,
        rope_theta=config.rope_theta,
        rope_scaling=None,
        norm_eps=1e-6,
        tie_embeddings=config.tie_embeddings,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        max_length=config.max_length,
    )


def _experts(config: ExpertsConfig) -> Experts:
    return Experts(
        count=config.count,
        per_token=config.per_token,
        intermediate_size=config.intermediate_size,
        normalize=config.normalize,
    )


def to_hf_config(architecture: Architecture) -> dict[str, Any]:
    """The Hugging Face config.json of an architecture."""
    return FAMILIES[Family(architecture.family)].hf_config(architecture)
