"""Megatron-core models: transformer config, layer spec, seeded initial weights, and a forward pass over packed tokens.

S = tokens of a micro-batch, M = positions whose logits are wanted, E = hidden size, V = padded vocabulary.
"""

import contextlib
import hashlib
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_trainer.errors import ConfigError, MissingExtra, Problem
from opd_trainer.megatron.attention import Packed, PackedAttention, attention_input
from opd_trainer.megatron.compat import cpu_tensors, has_gpu, quiet
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.families.base import (
    OUTPUT_HEAD,
    VALUE_HEAD,
    Architecture,
    WeightRule,
    hf_shapes,
    padded_vocab_size,
    shard,
    weight_rules,
)
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.megatron.value_head import ValueHead
from opd_trainer.model.config import AttentionBackend, Dtype, ModelConfig

INITIAL_STD = 0.02
"""Standard deviation of initial weights (GPT-2's); 1/sqrt(2 * layers) of it where the residual stream is written."""

DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class MegatronModel:
    """This process's part of a model.

    Attributes:
        modules: one Megatron GPTModel per chunk of layers; one chunk without virtual pipelining.
        architecture: shape of the whole model.
        runtime: where it lives.
        transformer_engine: whether its layers are Transformer Engine's.
        trainable: whether its parameters take gradients.
    """

    modules: list[Any]
    architecture: Architecture
    runtime: MegatronRuntime
    transformer_engine: bool
    trainable: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.modules[0].config.params_dtype

    def forward(self, packed: Packed, chunk: int = 0) -> Tensor:
        """Logits at the selected positions.

        Args:
            packed: the micro-batch.
            chunk: which of `modules` to run.

        Returns:
            On the last pipeline stage [M, V / tensor-parallel ranks] in the weights' dtype, or values f32[M, 1] of a
            value head; hidden states [S, 1, E] on the others, whose input the schedule sets with `set_input_tensor`.
            Without gradient unless `trainable`.
        """
        with contextlib.nullcontext() if self.trainable else torch.no_grad():
            return self._forward(self.modules[chunk], packed)

    def _forward(self, module: Any, packed: Packed) -> Tensor:
        hidden = None
        if module.pre_process:
            hidden = module.embedding(
                input_ids=packed.tokens.unsqueeze(0), position_ids=packed.position_ids.unsqueeze(0)
            )
        if self.transformer_engine:
            params, rotary = _te_input(module, packed)
        else:
            params, rotary = attention_input(packed, self.dtype), _rotary(module, packed.position_ids)
        hidden = module.decoder(
            hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=params
        )
        if not module.post_process:
            return hidden
        if module.config.sequence_parallel:
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

            # Every rank has the whole of a value head, so that their gradients are equal and not parts of a sum.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=not self.architecture.value_head, group=self.runtime.tp_group
            )
        weight = module.shared_embedding_or_output_weight() if self.architecture.tie_embeddings else None
        logits, _ = module.output_layer(hidden.index_select(0, packed.select), weight=weight)
        return logits.squeeze(1)

    def parameters(self) -> Iterator[tuple[WeightRule, Tensor]]:
        """This process's parameters, each with its rule; a tied head on a last stage of its own has the embedding's."""
        for rule, name, chunk in local_rules(self):
            yield rule, self.modules[chunk].get_parameter(name)


def build_model(
    runtime: MegatronRuntime,
    architecture: Architecture,
    settings: ModelConfig,
    megatron: MegatronConfig,
    *,
    trainable: bool,
) -> MegatronModel:
    """Builds this process's part of a model on its device, with seeded random weights.

    The initial weights depend on `runtime.seed` and the architecture only, not on the parallel layout.

    Args:
        runtime: started.
        architecture: shape of the whole model.
        settings: attention backend and dtype.
        megatron: parallel layout.
        trainable: False for teachers and references: no gradient, evaluation mode.

    Raises:
        ConfigError: the architecture cannot be cut that way, or the attention backend cannot be used.
        MissingExtra: Transformer Engine was asked for and is not installed.
    """
    problems = architecture_problems(architecture, megatron)
    if problems:
        raise ConfigError(problems)
    transformer_engine = _use_transformer_engine(settings.attention_backend)
    if megatron.sequence_parallel and not transformer_engine:
        why = "the norms outside of Transformer Engine cannot be sharded"
        fix = "Set megatron.sequence_parallel=false, or install Transformer Engine on a GPU machine"
        raise ConfigError([Problem("megatron.sequence_parallel", "true", why, fix)])
    with quiet():
        module = _build_module(runtime, architecture, settings, megatron, transformer_engine)
    # torch's norms take neither device nor dtype from Megatron's config.
    module.to(device=runtime.device, dtype=DTYPES[settings.dtype])
    model = MegatronModel([module], architecture, runtime, transformer_engine, trainable)
    _mark_sharding(model)
    initialize(model, runtime.seed)
    if not trainable:
        module.requires_grad_(False)
        module.eval()
    return model


def architecture_problems(architecture: Architecture, megatron: MegatronConfig) -> list[Problem]:
    """What keeps an architecture from being cut into this parallel layout."""
    cuts = [
        ("megatron.tensor_parallel", megatron.tensor_parallel, "query heads", architecture.num_heads),
        ("megatron.tensor_parallel", megatron.tensor_parallel, "key/value heads", architecture.num_kv_heads),
        ("megatron.tensor_parallel", megatron.tensor_parallel, "feed-forward width", architecture.intermediate_size),
        ("megatron.pipeline_parallel", megatron.pipeline_parallel, "layers", architecture.num_layers),
    ]
    problems = [
        Problem(key, str(size), f"it does not divide the model's {total} {what}", f"Set {key} to a divisor of {total}")
        for key, size, what, total in cuts
        if total % size
    ]
    if architecture.num_heads % architecture.num_kv_heads:
        why = f"it does not divide the {architecture.num_heads} query heads, which share the key/value heads"
        fix = f"Set it to a divisor of {architecture.num_heads}"
        problems.append(Problem("model.architecture.num_kv_heads", str(architecture.num_kv_heads), why, fix))
    if architecture.head_dim % 2:
        why = "the rotary embedding turns pairs of channels"
        fix = "Set it to an even number"
        problems.append(Problem("model.architecture.head_dim", str(architecture.head_dim), why, fix))
    return problems


def local_rules(model: MegatronModel) -> Iterator[tuple[WeightRule, str, int]]:
    """The rules of this process's parameters: rule, name inside the chunk, chunk. In the order of the whole model."""
    for chunk, module in enumerate(model.modules):
        local = {layer.layer_number - 1: index for index, layer in enumerate(module.decoder.layers)}
        for rule in weight_rules(model.architecture):
            name = _local_name(rule, local, model.transformer_engine)
            if name is not None and _has_parameter(module, name):
                yield rule, name, chunk
        if model.architecture.tie_embeddings and module.post_process and not module.pre_process:
            yield weight_rules(model.architecture)[0], OUTPUT_HEAD, chunk


def _local_name(rule: WeightRule, local: dict[int, int], transformer_engine: bool) -> str | None:
    """The parameter's name in a chunk that has the layers `local` (global index to local index)."""
    name = rule.megatron
    if rule.layer is not None:
        if rule.layer not in local:
            return None
        name = name.replace(f"layers.{rule.layer}.", f"layers.{local[rule.layer]}.", 1)
    if transformer_engine:
        # Transformer Engine keeps a norm inside of the linear layer behind it.
        name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        name = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    return name


def _has_parameter(module: Any, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return False
    return getattr(owner, leaf, None) is not None


def initialize(model: MegatronModel, seed: int) -> None:
    """Draws every weight anew from `seed` and its Hugging Face name, so that any parallel layout draws the same."""
    shapes = hf_shapes(model.architecture)
    runtime = model.runtime
    with torch.no_grad():
        for rule, parameter in model.parameters():
            tensors = [_initial(name, shapes[name], model.architecture, seed) for name in rule.huggingface]
            mine = shard(tensors, rule.layout, model.architecture, runtime.tp_rank, runtime.tp_size)
            parameter.copy_(mine)


def _initial(name: str, shape: tuple[int, ...], architecture: Architecture, seed: int) -> Tensor:
    if name.endswith(".bias") or name == VALUE_HEAD:
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = INITIAL_STD / math.sqrt(2 * architecture.num_layers) if residual else INITIAL_STD
    return torch.randn(shape, generator=generator) * std


def _mark_sharding(model: MegatronModel) -> None:
    """Tells Megatron which parameters are cut. It does so itself only where it also draws the initial weights, and the
    gradient norm counts a parameter that is not marked once instead of once per rank."""
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

    for rule, parameter in model.parameters():
        if rule.shard_axis is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, rule.shard_axis, 1)


def _use_transformer_engine(backend: AttentionBackend) -> bool:
    installed = importlib.util.find_spec("transformer_engine") is not None
    match backend:
        case AttentionBackend.torch:
            return False
        case AttentionBackend.auto:
            return installed and has_gpu()
        case AttentionBackend.te:
            if not installed:
                raise MissingExtra("transformer-engine", "te", "model.attention_backend=te")
            if not has_gpu():
                why = "Transformer Engine needs a GPU and there is none"
                raise ConfigError([Problem("model.attention_backend", "te", why, "Set model.attention_backend=torch")])
            return True


def _build_module(
    runtime: MegatronRuntime,
    architecture: Architecture,
    settings: ModelConfig,
    megatron: MegatronConfig,
    transformer_engine: bool,
) -> Any:
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
    return module


def _transformer_config(
    architecture: Architecture, settings: ModelConfig, megatron: MegatronConfig, transformer_engine: bool
) -> Any:
    from megatron.core.transformer import TransformerConfig

    dtype = DTYPES[settings.dtype]
    return TransformerConfig(
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
        # There are no experts, but Megatron refuses its own default here together with variable lengths.
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
    )


def _block_spec(config: Any, architecture: Architecture, transformer_engine: bool) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=architecture.qk_norm)
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    layer: Any = get_gpt_layer_local_spec(qk_layernorm=architecture.qk_norm, normalization="RMSNorm")
    layer.submodules.self_attention.submodules.core_attention = PackedAttention
    # Named here because for the last norm Megatron prefers Apex's or Transformer Engine's wherever one is installed.
    last_norm: Any = WrappedTorchNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=last_norm)


def _rotary(module: Any, position_ids: Tensor) -> Tensor:
    """Rotary angles of each token, f32[S, 1, 1, D]."""
    frequencies = module.rotary_pos_emb.inv_freq
    angles = torch.outer(position_ids.to(frequencies.dtype), frequencies)
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def _te_input(module: Any, packed: Packed) -> tuple[Any, Tensor]:
    """Transformer Engine's description of a packed micro-batch, and the angles of its positions."""
    from megatron.core.packed_seq_params import PackedSeqParams

    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=packed.cu_seqlens,
        cu_seqlens_kv=packed.cu_seqlens,
        max_seqlen_q=packed.max_length,
        max_seqlen_kv=packed.max_length,
    )
    return params, module.rotary_pos_emb(packed.max_length, packed_seq=True)
