"""What the embedded decoder must know of a model, read from its Hugging Face config.

Decoders of the families Llama, Qwen2 (Qwen2.5) and Qwen3, dense or (Qwen3) with experts: RMSNorm, grouped-query
attention, RoPE, SwiGLU.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_trainer.errors import UserError

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
_ROPE_TYPES = ("linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """Sizes and switches of the experts in every layer.

    Attributes:
        count: experts of a layer.
        per_token: experts that compute a token: those with the largest probabilities.
        intermediate_size: width of an expert's SwiGLU hidden layer.
        normalize: the probabilities of a token's experts are divided by their sum.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalize: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Sizes and switches of one decoder.

    Attributes:
        vocab_size: rows of the embedding and of the output head.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU hidden layer of a dense decoder.
        experts: in place of one SwiGLU per layer; None for a dense decoder.
        num_layers: transformer layers.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides `num_heads`.
        head_dim: width of one head.
        norm_eps: epsilon of every RMSNorm.
        qk_norm: RMSNorm over each query and key head (Qwen3).
        qkv_bias: biases on the query, key and value projections (Qwen2).
        output_bias: a bias on the attention output projection.
        mlp_bias: biases on the three SwiGLU projections.
        tie_embeddings: the output head is the embedding.
        max_length: context length, tokens.
        inv_freq: f32[head_dim / 2] rotary frequencies, radians per position.
        rope_scale: factor on cosine and sine (1 except for YaRN).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    experts: ExpertShape | None
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tie_embeddings: bool
    max_length: int
    inv_freq: Tensor
    rope_scale: float

    @classmethod
    def from_config(cls, config: Any) -> "DecoderShape":
        """Reads a `transformers` configuration.

        Raises:
            UserError: a family, activation, rotary embedding or attention pattern that this engine does not decode.
        """
        family = config.model_type
        if family not in FAMILIES:
            raise _unsupported(f"model_type {family!r}", f"it decodes {', '.join(FAMILIES)}")
        if config.hidden_act != "silu":
            raise _unsupported(f"hidden_act {config.hidden_act!r}", "it decodes SwiGLU (silu) only")
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise _unsupported("sliding-window attention", "it attends to the whole sequence")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        inv_freq, rope_scale = _rope(config, head_dim)
        attention_bias = bool(getattr(config, "attention_bias", False))
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            experts=_experts(config) if family == "qwen3_moe" else None,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            norm_eps=config.rms_norm_eps,
            qk_norm=family in ("qwen3", "qwen3_moe"),
            qkv_bias=family == "qwen2" or attention_bias,
            output_bias=family != "qwen2" and attention_bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            tie_embeddings=bool(config.tie_word_embeddings),
            max_length=config.max_position_embeddings,
            inv_freq=inv_freq,
            rope_scale=rope_scale,
        )


def _unsupported(what: str, why: str) -> UserError:
    return UserError(
        f"rollout: the embedded engine does not decode {what}: {why}. Use another model, or rollout=sglang"
    )


def _experts(config: Any) -> ExpertShape:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise _unsupported("layers without experts among others that have some", "it expects them in every layer")
    return ExpertShape(
        count=config.num_experts,
        per_token=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        normalize=config.norm_topk_prob,
    )


def _rope(config: Any, head_dim: int) -> tuple[Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if kind == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (parameters["rope_theta"] ** exponent), 1.0
    if kind not in _ROPE_TYPES:
        raise _unsupported(f"rope_type {kind!r}", f"it knows default, {', '.join(_ROPE_TYPES)}")
    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return inv_freq.float(), float(scale)
