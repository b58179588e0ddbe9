"""What a model family is: an architecture read from a Hugging Face config, and a map between both sets of weight names.

Shapes: H = query heads, G = key/value heads, D = head width, E = hidden size, F = feed-forward size, V = vocabulary.
Hugging Face keeps q [H*D, E], k and v [G*D, E], gate and up [F, E] apart. Megatron fuses q, k, v into one matrix,
interleaved by key/value group (so that a tensor-parallel rank holds whole groups), and gate and up into one matrix,
interleaved by rank.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any

import torch
from torch import Tensor

from opd_trainer.errors import CheckpointError
from opd_trainer.megatron.families.experts import Experts, experts_from_hf, experts_to_hf


class Layout(StrEnum):
    """How a Megatron parameter is made of Hugging Face tensors and cut over tensor-parallel ranks."""

    replicated = auto()
    """One tensor, the same on each rank."""
    columns = auto()
    """One tensor, cut along its second axis."""
    vocabulary = auto()
    """One tensor, its first axis padded to a multiple of the ranks and cut."""
    qkv = auto()
    """Three tensors, interleaved by key/value group, cut along the first axis."""
    gate_up = auto()
    """Two tensors, each cut along its first axis, stacked on each rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3's rescaling of the rotary frequencies; its other three constants are 1, 4 and 8192.

    Attributes:
        factor: by which the longest wavelengths are stretched.
    """

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The shape of a decoder, complete enough to build it and to write its Hugging Face config.

    Attributes:
        family: name of the family.
        hidden_size: width of the residual stream.
        num_layers: transformer layers.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of one head.
        intermediate_size: width of the SwiGLU hidden layer; a mixture of experts does not use it.
        experts: of every layer; None where the layers are dense.
        vocab_size: rows of the embedding, before any padding.
        rope_theta: base of the rotary embedding.
        rope_scaling: rescaling of the rotary frequencies; None for none.
        norm_eps: epsilon of the RMS norms.
        tie_embeddings: whether the output head is the embedding.
        qkv_bias: whether the query, key and value projections have biases.
        qk_norm: whether queries and keys are normalised per head.
        max_length: context length, tokens.
        value_head: whether the output is one number for each position (a critic or a reward model), not logits.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    experts: Experts | None
    vocab_size: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    max_length: int
    value_head: bool = False

    def with_value_head(self) -> "Architecture":
        """The same layers under a head for values."""
        return dataclasses.replace(self, value_head=True, tie_embeddings=False)


@dataclass(frozen=True, slots=True)
class WeightRule:
    """One Megatron parameter and the Hugging Face tensors that it is made of.

    Attributes:
        megatron: name in the whole model, layers numbered from 0 over all pipeline stages.
        huggingface: names of the tensors, in the order that `layout` expects.
        layout: how they are combined and cut.
        layer: the layer that it belongs to; None outside of the layers.
        expert: the expert that it belongs to; None outside of the experts. Tensor-parallel ranks do not cut experts.
    """

    megatron: str
    huggingface: tuple[str, ...]
    layout: Layout
    layer: int | None = None
    expert: int | None = None

    @property
    def shard_axis(self) -> int | None:
        """The axis that tensor-parallel ranks share; None when each has all of it, or none."""
        if self.layout is Layout.replicated or self.expert is not None:
            return None
        return 1 if self.layout is Layout.columns else 0


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """What distinguishes one family of decoders from another.

    Attributes:
        name: as in `model.architecture.family`.
        model_type: of its Hugging Face config.
        causal_lm: its class in transformers.
        qkv_bias: whether its q, k and v projections have biases.
        qk_norm: whether it normalises queries and keys.
        has_experts: whether its feed-forward layers are mixtures of experts.
        refused: config keys with the only value that we build, e.g. ``{"attention_bias": False}``.
    """

    name: str
    model_type: str
    causal_lm: str
    qkv_bias: bool
    qk_norm: bool
    has_experts: bool
    refused: Mapping[str, Any]

    @property
    def value_model(self) -> str:
        """The class in transformers of a model with a value head."""
        return self.causal_lm.replace("ForCausalLM", "ForSequenceClassification")

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        """Reads a Hugging Face config.

        Raises:
            CheckpointError: a key is missing, or asks for something that this family's Megatron model does not do.
        """
        for key, supported in self.refused.items():
            if config.get(key, supported) != supported:
                raise CheckpointError(
                    f"config.json: {key} is {config[key]!r}: a {self.name} model is built with {supported!r} only. "
                    f"Use another checkpoint, or score it on a server with opd=sglang"
                )
        missing = [key for key in _REQUIRED if key not in config]
        if missing:
            raise CheckpointError(
                f"config.json: {', '.join(missing)} missing: the model's shape is unknown without. "
                f"Download the model's own config.json again"
            )
        theta, scaling = _rope(config)
        heads = config["num_attention_heads"]
        value_head = self.value_model in (config.get("architectures") or ())
        return Architecture(
            family=self.name,
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config["intermediate_size"],
            experts=experts_from_hf(config) if self.has_experts else None,
            vocab_size=config["vocab_size"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tie_embeddings=config.get("tie_word_embeddings", False) and not value_head,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            max_length=config["max_position_embeddings"],
            value_head=value_head,
        )

    def hf_config(self, architecture: Architecture) -> dict[str, Any]:
        """The Hugging Face config of a model of this family."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": architecture.rope_theta}
        if architecture.rope_scaling is not None:
            rope = {**LLAMA3_CONSTANTS, "rope_type": "llama3", "rope_theta": architecture.rope_theta}
            rope["factor"] = architecture.rope_scaling.factor
        value_head = {"architectures": [self.value_model], "id2label": {"0": "value"}, "label2id": {"value": 0}}
        return {
            "architectures": [self.causal_lm],
            "model_type": self.model_type,
            "hidden_size": architecture.hidden_size,
            "num_hidden_layers": architecture.num_layers,
            "num_attention_heads": architecture.num_heads,
            "num_key_value_heads": architecture.num_kv_heads,
            "head_dim": architecture.head_dim,
            "intermediate_size": architecture.intermediate_size,
            "vocab_size": architecture.vocab_size,
            "rope_theta": architecture.rope_theta,
            "rope_parameters": rope,
            "rms_norm_eps": architecture.norm_eps,
            "tie_word_embeddings": architecture.tie_embeddings,
            "max_position_embeddings": architecture.max_length,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            **self.refused,
            **(experts_to_hf(architecture.experts) if architecture.experts else {}),
            **(value_head if architecture.value_head else {}),
        }


_REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)

LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from either spelling (transformers 5 merged both into one key)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    constants = {key: rope.get(key, value) for key, value in LLAMA3_CONSTANTS.items()}
    if kind != "llama3" or constants != LLAMA3_CONSTANTS:
        raise CheckpointError(
            f"config.json: rope scaling is {dict(rope)}: only llama3 scaling with {LLAMA3_CONSTANTS} is built. "
            f"Use a checkpoint without it, or score it on a server with opd=sglang"
        )
    return theta, RopeScaling(factor=float(rope["factor"]))


OUTPUT_HEAD = "output_layer.weight"
LM_HEAD = "lm_head.weight"
VALUE_HEAD = "score.weight"


def weight_rules(architecture: Architecture) -> list[WeightRule]:
    """The map of the whole model, in layer order: embedding, layers, final norm, output head (unless tied)."""
    rules = [WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Layout.vocabulary)]
    for layer in range(architecture.num_layers):
        rules.extend(_layer_rules(architecture, layer))
    rules.append(WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), Layout.replicated))
    if architecture.value_head:
        rules.append(WeightRule(OUTPUT_HEAD, (VALUE_HEAD,), Layout.replicated))
    elif not architecture.tie_embeddings:
        rules.append(WeightRule(OUTPUT_HEAD, (LM_HEAD,), Layout.vocabulary))
    return rules


def _layer_rules(architecture: Architecture, layer: int) -> list[WeightRule]:
    megatron, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."

    def rule(name: str, sources: Sequence[str], layout: Layout) -> WeightRule:
        return WeightRule(megatron + name, tuple(hf + source for source in sources), layout, layer)

    qkv = [f"self_attn.{name}_proj" for name in "qkv"]
    rules = [
        rule("input_layernorm.weight", ["input_layernorm.weight"], Layout.replicated),
        rule("self_attention.linear_qkv.weight", [f"{name}.weight" for name in qkv], Layout.qkv),
    ]
    if architecture.qkv_bias:
        rules.append(rule("self_attention.linear_qkv.bias", [f"{name}.bias" for name in qkv], Layout.qkv))
    if architecture.qk_norm:
        for name in ("q", "k"):
            source = f"self_attn.{name}_norm.weight"
            rules.append(rule(f"self_attention.{name}_layernorm.weight", [source], Layout.replicated))
    rules += [
        rule("self_attention.linear_proj.weight", ["self_attn.o_proj.weight"], Layout.columns),
        rule("pre_mlp_layernorm.weight", ["post_attention_layernorm.weight"], Layout.replicated),
    ]
    if architecture.experts is None:
        return rules + _mlp_rules(f"{megatron}mlp.", f"{hf}mlp.", layer)
    rules.append(rule("mlp.router.weight", ["mlp.gate.weight"], Layout.replicated))
    for expert in range(architecture.experts.count):
        rules += _mlp_rules(
            f"{megatron}mlp.experts.local_experts.{expert}.", f"{hf}mlp.experts.{expert}.", layer, expert
        )
    return rules


def _mlp_rules(megatron: str, hf: str, layer: int, expert: int | None = None) -> list[WeightRule]:
    gate_up = (f"{hf}gate_proj.weight", f"{hf}up_proj.weight")
    return [
        WeightRule(f"{megatron}linear_fc1.weight", gate_up, Layout.gate_up, layer, expert),
        WeightRule(f"{megatron}linear_fc2.weight", (f"{hf}down_proj.weight",), Layout.columns, layer, expert),
    ]


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the model under its Hugging Face name."""
    embedding = (architecture.vocab_size, architecture.hidden_size)
    queries, keys = architecture.num_heads * architecture.head_dim, architecture.num_kv_heads * architecture.head_dim
    hidden, experts = architecture.hidden_size, architecture.experts
    feed_forward = architecture.intermediate_size if experts is None else experts.intermediate_size
    by_suffix = {
        "embed_tokens.weight": embedding,
        LM_HEAD: embedding,
        VALUE_HEAD: (1, hidden),
        "q_proj.weight": (queries, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (keys, hidden),
        "q_proj.bias": (queries,),
        "k_proj.bias": (keys,),
        "v_proj.bias": (keys,),
        "o_proj.weight": (hidden, queries),
        "gate_proj.weight": (feed_forward, hidden),
        "up_proj.weight": (feed_forward, hidden),
        "down_proj.weight": (hidden, feed_forward),
        "gate.weight": (0 if experts is None else experts.count, hidden),
        "q_norm.weight": (architecture.head_dim,),
        "k_norm.weight": (architecture.head_dim,),
    }
    names = [name for rule in weight_rules(architecture) for name in rule.huggingface]
    return {name: by_suffix.get(".".join(name.split(".")[-2:]), (hidden,)) for name in names}


def shard(tensors: Sequence[Tensor], layout: Layout, architecture: Architecture, rank: int, size: int) -> Tensor:
    """The part of a Megatron parameter that rank `rank` of the `size` that share it holds.

    Args:
        tensors: the whole Hugging Face tensors of the rule, in its order.
        layout: of the rule.
        architecture: gives the heads.
        rank: tensor-parallel rank; 0 for an expert.
        size: tensor-parallel ranks; 1 for an expert.
    """
    match layout:
        case Layout.replicated:
            return tensors[0]
        case Layout.columns:
            return tensors[0].chunk(size, dim=1)[rank]
        case Layout.vocabulary:
            return _pad_rows(tensors[0], size).chunk(size, dim=0)[rank]
        case Layout.qkv:
            return _fuse_qkv(tensors, architecture).chunk(size, dim=0)[rank]
        case Layout.gate_up:
            return torch.cat([tensor.chunk(size, dim=0)[rank] for tensor in tensors])


def unshard(shards: Sequence[Tensor], layout: Layout, architecture: Architecture) -> tuple[Tensor, ...]:
    """The inverse of `shard`: whole Hugging Face tensors from the shards of all ranks."""
    match layout:
        case Layout.replicated:
            return (shards[0],)
        case Layout.columns:
            return (_join(shards, 1),)
        case Layout.vocabulary:
            return (_join(shards, 0)[: architecture.vocab_size],)
        case Layout.qkv:
            return _split_qkv(_join(shards, 0), architecture)
        case Layout.gate_up:
            halves = [piece.chunk(2, dim=0) for piece in shards]
            return (_join([half[0] for half in halves], 0), _join([half[1] for half in halves], 0))


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of embedding and output head: the vocabulary, padded so that every rank has as many."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def _join(shards: Sequence[Tensor], dim: int) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)


def _pad_rows(tensor: Tensor, multiple: int) -> Tensor:
    rows = padded_vocab_size(len(tensor), multiple)
    if rows == len(tensor):
        return tensor
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _fuse_qkv(tensors: Sequence[Tensor], architecture: Architecture) -> Tensor:
    groups = architecture.num_kv_heads
    grouped = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(fused: Tensor, architecture: Architecture) -> tuple[Tensor, ...]:
    width = architecture.head_dim
    queries = architecture.num_heads // architecture.num_kv_heads * width
    grouped = fused.reshape(architecture.num_kv_heads, queries + 2 * width, *fused.shape[1:])
    return tuple(part.flatten(0, 1) for part in grouped.split([queries, width, width], dim=1))
