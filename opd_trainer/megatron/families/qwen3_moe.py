"""Qwen3, mixture of experts: the attention of Qwen3, and experts in every layer."""

from opd_trainer.megatron.families.base import ModelFamily

QWEN3_MOE = ModelFamily(
    name="qwen3_moe",
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    qkv_bias=False,
    qk_norm=True,
    has_experts=True,
    refused={
        "attention_bias": False,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
)
