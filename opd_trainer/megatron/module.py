"""The Megatron-core module behind a model: transformer config and layer spec."""

from typing import Any

import torch

from opd_trainer.megatron.attention import PackedAttention
from opd_trainer.megatron.compat import cpu_tensors, has_gpu
from opd_trainer.megatron.config import MegatronConfig, Recompute
from opd_trainer.megatron.families.base import Architecture, padded_vocab_size
from opd_trainer.megatron.families.experts import Experts
from opd_trainer.megatron.layout import stage_layers
from opd_trainer.megatron.norm import Norm
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.megatron.swiglu import swiglu
from opd_trainer.megatron.value_head import ValueHead
from opd_trainer.model.config import Dtype, ModelConfig

DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


def build_module(
    runtime: MegatronRuntime,
    architecture: Architecture,
    settings: ModelConfig,
    megatron: MegatronConfig,
    transformer_engine: bool,
) -> Any:
    """This process's Megatron GPTModel, without weights.

    Args:
        runtime: started.
        architecture: shape of the whole model.
        settings: dtype.
        megatron: parallel layout.
        transformer_engine: whether its layers are Transformer Engine's.
    """
    from megatron.core.models.gpt import GPTModel

    config = _transformer_config(architecture, settings, megatron, transformer_engine)
    scaling = architecture.rope_scaling
    with cpu_tensors():
        module = GPTModel(
            config=config,
            transformer_layer_spec=_block_spec(config, architecture, transformer_engine),
            vocab_size=padded_vocab_size(architecture.vocab_size, megatron.tensor_parallel),
            max_sequence_length=architecture.max_length,
            pre_process=runtime.is_first_stage,
            post_process=runtime.is_last_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,  # pyright: ignore[reportArgumentType]  (Megatron only computes with it)
            rope_scaling=scaling is not None,
            rope_scaling_factor=scaling.factor if scaling else 1.0,
        )
    if architecture.value_head and runtime.is_last_stage:
        module.output_layer = ValueHead(architecture.hidden_size)  # pyright: ignore[reportAttributeAccessIssue]
    elif megatron.sequence_parallel and runtime.is_last_stage:
        # `MegatronModel.forward` gathers the hidden states and reduces their gradients itself, to run the head on
        # selected positions only.
        output_layer: Any = module.output_layer
        output_layer.sequence_parallel, output_layer.disable_grad_reduce = False, True
    return module


def _transformer_config(
    architecture: Architecture, settings: ModelConfig, megatron: MegatronConfig, transformer_engine: bool
) -> Any:
    from megatron.core.transformer import TransformerConfig

    dtype = DTYPES[settings.dtype]
    config = TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.intermediate_size,
        layernorm_epsilon=architecture.norm_eps,
        normalization="RMSNorm",
        qk_layernorm=architecture.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=megatron.tensor_parallel,
        pipeline_model_parallel_size=megatron.pipeline_parallel,
        context_parallel_size=megatron.context_parallel,
        sequence_parallel=megatron.sequence_parallel,
        # Micro-batches differ in length, and pipeline stages must tell each other how much.
        variable_seq_lengths=megatron.pipeline_parallel > 1,
        pipeline_model_parallel_layout=_stages(architecture, megatron),
        # Megatron refuses its own default here together with variable lengths, even without experts.
        moe_token_dispatcher_type="alltoall",
        # `initialize` draws the weights; on the CPU buffers must not be asked of a GPU.
        perform_initialization=False,
        use_cpu_initialization=not has_gpu(),
        # Fused kernels of Apex and Transformer Engine.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=transformer_engine,
        persist_layer_norm=transformer_engine,
        **_experts(architecture.experts, megatron, transformer_engine),
        **_recompute(architecture, megatron),
    )
    if not transformer_engine:
        # An MLP so configured gives the whole of its first product to its activation.
        config.use_te_activation_func, config.activation_func = True, swiglu
    if not has_gpu():
        # gloo exchanges only equal numbers of tokens, and `prepare` sees to it that they are; see the refusal above.
        config.moe_token_dispatcher_type = "allgather"
    return config


def _stages(architecture: Architecture, megatron: MegatronConfig) -> Any:
    """The layers of each pipeline stage as Megatron wants them; None without a pipeline."""
    if megatron.pipeline_parallel == 1:
        return None
    stages = [["decoder"] * layers for layers in stage_layers(architecture.num_layers, megatron)]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def _experts(experts: Experts | None, megatron: MegatronConfig, transformer_engine: bool) -> dict[str, Any]:
    """Settings of a mixture of experts: no token is dropped, nothing but the loss is optimised."""
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.intermediate_size,
        # A softmax over all experts before the choice; or over those chosen, which equals dividing by their sum.
        "moe_router_pre_softmax": not experts.normalize,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": transformer_engine,
        "expert_model_parallel_size": megatron.expert_parallel,
        "expert_tensor_parallel_size": 1,
    }


def _recompute(architecture: Architecture, megatron: MegatronConfig) -> dict[str, Any]:
    match megatron.recompute:
        case Recompute.none:
            return {}
        case Recompute.selective:
            module = "mlp" if architecture.experts is None else "moe"
            return {"recompute_granularity": "selective", "recompute_modules": [module]}
        case Recompute.full:
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _block_spec(config: Any, architecture: Architecture, transformer_engine: bool) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    num_experts = None if architecture.experts is None else architecture.experts.count
    if transformer_engine:
        layer: Any = get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=num_experts is not None, qk_layernorm=architecture.qk_norm
        )
        if config.context_parallel_size > 1:
            layer.submodules.self_attention.submodules.core_attention = PackedAttention
        return layer
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    layer = get_gpt_layer_local_spec(
        num_experts=num_experts, qk_layernorm=architecture.qk_norm, normalization="RMSNorm"
    )
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    if architecture.qk_norm:
        attention.q_layernorm = attention.k_layernorm = Norm
    last_norm: Any = Norm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=last_norm)
