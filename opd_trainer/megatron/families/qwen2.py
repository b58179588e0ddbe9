"""Qwen2 and Qwen2.5, dense: biases on query, key and value."""

from opd_trainer.megatron.families.base import ModelFamily

QWEN2 = ModelFamily(
    name="qwen2",
    model_type="qwen2",
    causal_lm="Qwen2ForCausalLM",
    qkv_bias=True,
    qk_norm=False,
    has_experts=False,
    refused={"use_sliding_window": False, "hidden_act": "silu"},
)
