"""Qwen3, dense: no biases, queries and keys normalised per head."""

from opd_trainer.megatron.families.base import ModelFamily

QWEN3 = ModelFamily(
    name="qwen3",
    model_type="qwen3",
    causal_lm="Qwen3ForCausalLM",
    qkv_bias=False,
    qk_norm=True,
    has_experts=False,
    refused={"attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"},
)
