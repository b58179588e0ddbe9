"""Llama 2 and 3: no biases, no query/key norm."""

from opd_trainer.megatron.families.base import ModelFamily

LLAMA = ModelFamily(
    name="llama",
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    qkv_bias=False,
    qk_norm=False,
    has_experts=False,
    refused={"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
)
