"""How much memory one rank needs for its part of a model: arithmetic only, nothing is built.

S = tokens of a micro-batch on this rank.
"""

import dataclasses
import math
from dataclasses import dataclass

from opd_trainer.megatron.config import MegatronConfig, Recompute
from opd_trainer.megatron.families.base import (
    Architecture,
    Layout,
    WeightRule,
    hf_shapes,
    padded_vocab_size,
    weight_rules,
)
from opd_trainer.megatron.layout import stage_layers
from opd_trainer.model.config import Dtype

BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2}
FP32 = 4
CHUNK_COPIES = 6
"""fp32 copies of a chunk of logits that `log_probs` has at once, measured: logits, shifted, exponentials, products."""
ADAM_COPIES = 2
"""Moments that Adam keeps of each parameter."""


@dataclass(frozen=True, slots=True)
class LocalSize:
    """Parameters on one rank.

    Attributes:
        dense: outside of experts.
        experts: of experts.
        largest: of the largest parameter.
    """

    dense: int
    experts: int
    largest: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.experts


def local_size(architecture: Architecture, layout: MegatronConfig, stage: int = 0) -> LocalSize:
    """Parameters of a rank on a pipeline stage.

    Args:
        architecture: of the whole model.
        layout: parallel layout.
        stage: pipeline stage, from 0.
    """
    one_layer = dataclasses.replace(architecture, num_layers=1)
    shapes, last = hf_shapes(one_layer), layout.pipeline_parallel - 1
    dense = experts = largest = 0
    for rule in weight_rules(one_layer):
        elements = sum(math.prod(shapes[name]) for name in rule.huggingface)
        if rule.layout is Layout.vocabulary:
            rows, width = shapes[rule.huggingface[0]]
            elements = padded_vocab_size(rows, layout.tensor_parallel) * width
        if rule.shard_axis is not None:
            elements //= layout.tensor_parallel
        copies = _copies(rule, architecture, layout, stage)
        if copies:
            largest = max(largest, elements)
        if rule.expert is None:
            dense += elements * copies
        else:
            experts += elements * copies
    if architecture.tie_embeddings and stage == last != 0:
        # The last stage's head is a copy of the first stage's embedding.
        rows = padded_vocab_size(architecture.vocab_size, layout.tensor_parallel) // layout.tensor_parallel
        dense, largest = dense + rows * architecture.hidden_size, max(largest, rows * architecture.hidden_size)
    return LocalSize(dense, experts // layout.expert_parallel, largest)


def _copies(rule: WeightRule, architecture: Architecture, layout: MegatronConfig, stage: int) -> int:
    """How often a rank of this stage has a parameter like this one."""
    if rule.layer is not None:
        return stage_layers(architecture.num_layers, layout)[stage]
    if rule.megatron.startswith("embedding."):
        return int(stage == 0)
    return int(stage == layout.pipeline_parallel - 1)


def gradient_bytes(size: LocalSize) -> int:
    """The gradient buffer, which is fp32 whatever the dtype."""
    return size.total * FP32


def optimizer_bytes(size: LocalSize, dtype: Dtype, layout: MegatronConfig, world_size: int) -> int:
    """Adam's moments and, where the weights are not fp32, the main parameters.

    Args:
        size: of the model on this rank.
        dtype: of the weights.
        layout: parallel layout; `distributed_optimizer` spreads the state over data-parallel ranks.
        world_size: workers.
    """
    return optimized_elements(size, layout, world_size) * FP32 * (ADAM_COPIES + (dtype is not Dtype.float32))


def optimized_elements(size: LocalSize, layout: MegatronConfig, world_size: int) -> int:
    """Parameters that this rank's optimizer steps; see `optimizer_bytes`."""
    if not layout.distributed_optimizer:
        return size.total
    dense = -(-size.dense * layout.tensor_parallel * layout.pipeline_parallel // world_size)
    experts = -(-size.experts * layout.expert_parallel * layout.pipeline_parallel // world_size)
    return dense + experts


@dataclass(frozen=True, slots=True)
class Activations:
    """What the layers of a rank hold around a backward pass, bytes.

    Attributes:
        kept: from the forward pass on.
        working: computed anew, for one layer at a time.
    """

    kept: int
    working: int

    @property
    def peak(self) -> int:
        """Both."""
        return self.kept + self.working


def activations(
    architecture: Architecture,
    layout: MegatronConfig,
    tokens: int,
    dtype: Dtype,
    stage: int = 0,
    *,
    short_keys: int | None,
) -> Activations:
    """An estimate for training, without the output head; that of torch's operations, Transformer Engine's keep less.

    Pipeline stages hold as many micro-batches as there are stages from them to the last (1F1B).

    Args:
        architecture: of the whole model.
        layout: parallel layout and recomputation.
        tokens: S of each micro-batch.
        dtype: of weights and activations.
        stage: pipeline stage, from 0.
        short_keys: most keys of rows whose attention is two products (see `padded_attention`), 0 where none is; None
            where a varlen kernel does without padding.
    """
    layers = stage_layers(architecture.num_layers, layout)[stage]
    layer = _layer_bytes(architecture, layout, BYTES[dtype], short_keys=short_keys)
    stream = _stream(architecture, layout)
    kept, working = _norm_bytes(stream, BYTES[dtype]), 0
    rotation = 2 * architecture.head_dim * BYTES[dtype]  # cosines and sines, the same for all layers
    match layout.recompute:
        case Recompute.none:
            kept += rotation + layers * (layer.attention + layer.feed_forward)
        case Recompute.selective:
            kept, working = kept + rotation + layers * layer.attention, layer.feed_forward
        case Recompute.full:
            kept += layers * stream * BYTES[dtype]
            working = rotation + layer.attention + layer.feed_forward
    return Activations(kept * tokens * (layout.pipeline_parallel - stage), working * tokens)


def passing_bytes(architecture: Architecture, layout: MegatronConfig, tokens: int, dtype: Dtype) -> int:
    """An estimate of what a forward pass without gradient holds at once: one layer's results, all at their largest."""
    layer = _layer_bytes(architecture, layout, BYTES[dtype], short_keys=0)
    return tokens * max(layer.attention, layer.feed_forward)


@dataclass(frozen=True, slots=True)
class _LayerBytes:
    """What autograd keeps of one layer for each token: attention with all norms, and inside of the feed-forward."""

    attention: int
    feed_forward: int


def _layer_bytes(
    architecture: Architecture, layout: MegatronConfig, item: int, *, short_keys: int | None
) -> _LayerBytes:
    tp, width = layout.tensor_parallel, architecture.head_dim
    heads, key_heads = architecture.num_heads // tp, architecture.num_kv_heads // tp
    queries, keys = heads * width, key_heads * width
    core = 2 * queries + 2 * keys
    if short_keys is not None:
        # Padded rows: keys and values once for each query head, or the shares of the keys.
        core = max(5 * queries, core + heads * short_keys)
    # Queries, keys, values and results.
    attention = item * core + FP32 * heads
    attention += 2 * _norm_bytes(_stream(architecture, layout), item)
    if architecture.qk_norm:
        # Queries copied out of the fused projection, which stays because of the keys and values.
        attention += item * (queries + 2 * keys)
        attention += item * queries + FP32 * (queries + heads) + FP32 * (keys + key_heads)
    experts = architecture.experts
    if experts is None:
        # Gate and up in one, and what becomes of them.
        return _LayerBytes(attention, item * 3 * architecture.intermediate_size // tp)
    # A token goes in once for each of its experts, whose products are also multiplied by their shares.
    per_expert = item * (4 * experts.intermediate_size + architecture.hidden_size) + FP32
    return _LayerBytes(attention, experts.per_token * per_expert + 2 * FP32 * experts.count)


def _stream(architecture: Architecture, layout: MegatronConfig) -> int:
    """Width of the residual stream on one rank."""
    return architecture.hidden_size // (layout.tensor_parallel if layout.sequence_parallel else 1)


def _norm_bytes(width: int, item: int) -> int:
    """A norm keeps its input and the normalised one in fp32, the inverse size, and what it returns."""
    return 2 * FP32 * width + FP32 + item * width


def logits_bytes(
    architecture: Architecture, layout: MegatronConfig, positions: int, dtype: Dtype, *, gradient: bool
) -> int:
    """An upper bound of the output head's logits, their gradient, and the chunk of them that is in fp32.

    Args:
        architecture: of the whole model; one with a value head has next to none.
        layout: parallel layout and `log_prob_chunk_tokens`.
        positions: positions whose log-prob is wanted.
        dtype: of the logits.
        gradient: whether they are trained on.
    """
    if architecture.value_head:
        return positions * FP32
    columns = padded_vocab_size(architecture.vocab_size, layout.tensor_parallel) // layout.tensor_parallel
    chunk = min(positions, layout.log_prob_chunk_tokens)
    return columns * (positions * BYTES[dtype] * (2 if gradient else 1) + chunk * FP32 * CHUNK_COPIES)
