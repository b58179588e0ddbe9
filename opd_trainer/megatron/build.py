"""Megatron-core models: transformer config, layer spec, seeded initial weights, and a forward pass over packed tokens.

S = tokens of a micro-batch, M = positions whose logits are wanted, E = hidden size, V = padded vocabulary.
"""

import contextlib
import hashlib
import importlib.util
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_trainer.errors import ConfigError, MissingExtra, Problem
from opd_trainer.megatron.attention import Packed, attention_input
from opd_trainer.megatron.compat import has_gpu, quiet
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.families.base import (
    OUTPUT_HEAD,
    VALUE_HEAD,
    Architecture,
    WeightRule,
    hf_shapes,
    shard,
    weight_rules,
)
from opd_trainer.megatron.layout import stage_layers
from opd_trainer.megatron.module import DTYPES, build_module
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.model.config import AttentionBackend, ModelConfig

INITIAL_STD = 0.02
"""Standard deviation of initial weights (GPT-2's); 1/sqrt(2 * layers) of it where the residual stream is written."""


@dataclass(frozen=True, slots=True)
class MegatronModel:
    """This process's part of a model.

    Attributes:
        modules: one Megatron GPTModel, in the list that Megatron's schedules and optimizer take.
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
    def own_attention(self) -> bool:
        """Whether core attention is ours; Transformer Engine's takes other shares of a sequence than we cut."""
        return not self.transformer_engine or self.runtime.cp_size > 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.modules[0].config.params_dtype

    def forward(self, packed: Packed, *, head: bool = True) -> Tensor:
        """Logits at the selected positions.

        Args:
            packed: the micro-batch.
            head: False for the hidden states [M, E] that `logits` takes, in place of the output of the last stage.

        Returns:
            On the last pipeline stage [M, V / tensor-parallel ranks] in the weights' dtype, or values f32[M, 1] of a
            value head; hidden states [S, 1, E] on the others, whose input the schedule sets with `set_input_tensor`.
            Without gradient unless `trainable`.
        """
        (module,) = self.modules
        with contextlib.nullcontext() if self.trainable else torch.no_grad():
            hidden = self._hidden(module, packed)
            return self.logits(hidden) if head and module.post_process else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The output head on hidden states [M, E] of the last stage: [M, V / tensor-parallel ranks] (see `forward`)."""
        (module,) = self.modules
        weight = module.shared_embedding_or_output_weight() if self.architecture.tie_embeddings else None
        logits, _ = module.output_layer(hidden.unsqueeze(1), weight=weight)
        return logits.squeeze(1)

    def _hidden(self, module: Any, packed: Packed) -> Tensor:
        """[M, E] at the selected positions on the last pipeline stage, [S, 1, E] on the others."""
        hidden = None
        if module.pre_process:
            hidden = module.embedding(
                input_ids=packed.tokens.unsqueeze(0), position_ids=packed.position_ids.unsqueeze(0)
            )
        if self.own_attention:
            # Core attention rotates queries and keys itself.
            params, rotary = attention_input(packed, self.dtype, _angles(module, packed.position_ids)), None
        else:
            params, rotary = _te_input(module, packed)
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
        return hidden.index_select(0, packed.select).squeeze(1)

    def parameters(self) -> Iterator[tuple[WeightRule, Tensor]]:
        """This process's parameters, each with its rule; a tied head on a last stage of its own has the embedding's."""
        for rule, name, chunk in local_rules(self):
            yield rule, self.modules[chunk].get_parameter(name)

    def cut(self, rule: WeightRule) -> tuple[int, int]:
        """Which part of a parameter this process has, of how many (see `shard`)."""
        return (0, 1) if rule.expert is not None else (self.runtime.tp_rank, self.runtime.tp_size)


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
    problems = architecture_problems(architecture, megatron, trainable=trainable)
    if problems:
        raise ConfigError(problems)
    transformer_engine = _use_transformer_engine(settings.attention_backend)
    with quiet():
        module = build_module(runtime, architecture, settings, megatron, transformer_engine)
    # torch's norms take neither device nor dtype from Megatron's config.
    module.to(device=runtime.device, dtype=DTYPES[settings.dtype])
    model = MegatronModel([module], architecture, runtime, transformer_engine, trainable)
    _mark_sharding(model)
    initialize(model, runtime.seed)
    if not trainable:
        module.requires_grad_(False)
        module.eval()
    return model


def architecture_problems(architecture: Architecture, megatron: MegatronConfig, *, trainable: bool) -> list[Problem]:
    """What keeps an architecture from being cut into this parallel layout.

    Args:
        architecture: shape of the whole model.
        megatron: parallel layout, which is the student's.
        trainable: False for models beside the student, which need not use all of its layout.
    """
    cuts = [
        ("megatron.tensor_parallel", megatron.tensor_parallel, "query heads", architecture.num_heads),
        ("megatron.tensor_parallel", megatron.tensor_parallel, "key/value heads", architecture.num_kv_heads),
    ]
    if architecture.experts is None:
        width = architecture.intermediate_size
        cuts.append(("megatron.tensor_parallel", megatron.tensor_parallel, "feed-forward width", width))
    else:
        cuts.append(("megatron.expert_parallel", megatron.expert_parallel, "experts", architecture.experts.count))
    problems = [
        Problem(key, str(size), f"it does not divide the model's {total} {what}", f"Set {key} to a divisor of {total}")
        for key, size, what, total in cuts
        if total % size
    ]
    problems += _depth_problems(architecture.num_layers, megatron, trainable=trainable)
    problems += _expert_problems(architecture, megatron, trainable=trainable)
    if architecture.num_heads % architecture.num_kv_heads:
        why = f"it does not divide the {architecture.num_heads} query heads, which share the key/value heads"
        fix = f"Set it to a divisor of {architecture.num_heads}"
        problems.append(Problem("model.architecture.num_kv_heads", str(architecture.num_kv_heads), why, fix))
    if architecture.head_dim % 2:
        why = "the rotary embedding turns pairs of channels"
        fix = "Set it to an even number"
        problems.append(Problem("model.architecture.head_dim", str(architecture.head_dim), why, fix))
    return problems


def _depth_problems(num_layers: int, megatron: MegatronConfig, *, trainable: bool) -> list[Problem]:
    stages, layers = megatron.pipeline_parallel, megatron.pipeline_layers
    if num_layers < stages:
        why = f"the model has {num_layers} layers, and each stage needs one"
        fix = f"Set megatron.pipeline_parallel={num_layers} or less"
        return [Problem("megatron.pipeline_parallel", str(stages), why, fix)]
    if trainable and layers is not None and sum(layers) != num_layers:
        why = f"the model has {num_layers} layers, and these are {sum(layers)}"
        fix = f"Set megatron.pipeline_layers=[{','.join(map(str, stage_layers(num_layers, megatron)))}]"
        return [Problem("megatron.pipeline_layers", str(list(layers)), why, fix)]
    return []


def _expert_problems(architecture: Architecture, megatron: MegatronConfig, *, trainable: bool) -> list[Problem]:
    if architecture.experts is None:
        if trainable and megatron.expert_parallel > 1:
            why = f"a {architecture.family} model has no experts to share"
            fix = "Set megatron.expert_parallel=1"
            return [Problem("megatron.expert_parallel", str(megatron.expert_parallel), why, fix)]
        return []
    if megatron.tensor_parallel > 1 and not megatron.sequence_parallel:
        why = "tensor-parallel ranks would all send the same tokens to the experts"
        fix = "Set megatron.sequence_parallel=true"
        return [Problem("megatron.sequence_parallel", "false with a mixture of experts", why, fix)]
    return []


def local_rules(model: MegatronModel) -> Iterator[tuple[WeightRule, str, int]]:
    """The rules of this process's parameters: rule, name inside the chunk, chunk. In the order of the whole model."""
    for chunk, module in enumerate(model.modules):
        local = {layer.layer_number - 1: index for index, layer in enumerate(module.decoder.layers)}
        for rule in weight_rules(model.architecture):
            name = _local_name(rule, local, model)
            if name is not None and _has_parameter(module, name):
                yield rule, name, chunk
        if model.architecture.tie_embeddings and module.post_process and not module.pre_process:
            yield weight_rules(model.architecture)[0], OUTPUT_HEAD, chunk


def _local_name(rule: WeightRule, local: dict[int, int], model: MegatronModel) -> str | None:
    """The parameter's name in a chunk that has the layers `local` (global index to local index)."""
    name = rule.megatron
    if rule.layer is not None:
        if rule.layer not in local:
            return None
        name = name.replace(f"layers.{rule.layer}.", f"layers.{local[rule.layer]}.", 1)
    if rule.expert is not None:
        assert model.architecture.experts is not None, "rules of experts come with experts"
        count = model.architecture.experts.count // model.runtime.ep_size
        if rule.expert // count != model.runtime.ep_rank:
            return None
        name = name.replace(f"local_experts.{rule.expert}.", f"local_experts.{rule.expert % count}.", 1)
    return _transformer_engine_name(name, model.architecture) if model.transformer_engine else name


def _transformer_engine_name(name: str, architecture: Architecture) -> str:
    """Transformer Engine keeps a norm inside of the linear layer behind it, and a layer's experts in one module."""
    name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    if architecture.experts is None:
        return name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    return _LOCAL_EXPERT.sub(r"experts.\2.weight\1", name)


_LOCAL_EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")


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
    with torch.no_grad():
        for rule, parameter in model.parameters():
            tensors = [_initial(name, shapes[name], model.architecture, seed) for name in rule.huggingface]
            parameter.copy_(shard(tensors, rule.layout, model.architecture, *model.cut(rule)))


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
    """Tells Megatron which parameters differ between ranks. It does so itself only where it also draws the initial
    weights, and the gradient norm counts a parameter that is not marked for the first tensor-parallel rank only."""
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

    shared = model.runtime.ep_size > 1
    for rule, parameter in model.parameters():
        axis = 0 if rule.expert is not None and shared else rule.shard_axis
        if axis is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, axis, 1)
        if rule.expert is not None and not shared:
            # Experts that nobody shares are reduced like other weights, which leaves out tensor-parallel ranks.
            setattr(parameter, "sequence_parallel", model.modules[0].config.sequence_parallel)  # noqa: B010


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


def _angles(module: Any, position_ids: Tensor) -> Tensor:
    """Rotary angles of each token, f32[S, D/2]."""
    frequencies = module.rotary_pos_emb.inv_freq
    return torch.outer(position_ids.to(frequencies.dtype), frequencies)


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
