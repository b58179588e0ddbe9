"""Core attention over packed sequences on plain torch, plugged into Megatron's layer spec.

S = tokens of a micro-batch that this rank computes, laid end to end; H = query heads, G = key/value heads, D = head
width. C = stretches of consecutive tokens of a sequence: whole sequences, or parts where context-parallel ranks share
them (see `opd_trainer.megatron.context`), which then gather each other's keys and values.

Two ways, chosen by device and number format:

* varlen: torch's flash attention, on CUDA in 16 bit. No padding.
* padded: everywhere else. Stretches with about as many keys are scattered into right-padded rows; with a causal mask a
  real query never sees the padding behind it, so whole sequences need no mask and SDPA may use its fused causal kernel.
  Short rows on a CPU are two plain products.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional

LONGEST_TO_SHORTEST = 2.0
"""Stretches share a padded block while the longest has at most this multiple of the shortest one's keys: at most half
of the block's keys are padding, and a micro-batch needs few kernel launches."""
SHORT = 256
"""Keys up to which attention on a CPU is two products around a softmax. torch's fused kernel is built for long rows: at
174 keys in bf16 its backward pass takes five times as long, at 34 keys ten times (one thread, AVX512_BF16)."""


@dataclass(frozen=True, slots=True)
class Keys:
    """What the queries of a rank attend to where context-parallel ranks share the sequences.

    Each rank has some stretches of consecutive tokens of each sequence; a stretch attends to its sequence up to its own
    end. K = keys of all stretches, C = stretches.

    Attributes:
        group: the ranks that share the sequences, S tokens each.
        rows: i64[K], the keys of each stretch laid end to end, as rows of the keys of all ranks laid end to end.
        cu_seqlens: i32[C+1], where the keys of each stretch start; the last entry is K.
        max_length: the most keys of a stretch.
    """

    group: ProcessGroup
    rows: Tensor
    cu_seqlens: Tensor
    max_length: int


@dataclass(frozen=True, slots=True)
class Packed:
    """A micro-batch as a model takes it, on its device.

    Attributes:
        tokens: i64[S].
        position_ids: i64[S], position of each token inside its sequence.
        cu_seqlens: i32[C+1], where each stretch of consecutive tokens of a sequence starts; the last entry is S.
        max_length: the longest stretch, tokens.
        select: i64[M], the positions whose logits are wanted.
        keys: None where each stretch is a whole sequence and attends to itself.
    """

    tokens: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_length: int
    select: Tensor
    keys: Keys | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A right-padded block of stretches.

    Attributes:
        count: stretches, one row each.
        length: slots for queries in a row.
        keys: slots for keys in a row.
        visible: bool[count, 1, length, keys], which key a query may see; None where query i sees keys 0 to i.
    """

    count: int
    length: int
    keys: int
    visible: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Blocks:
    """Right-padded blocks that hold every query and key of a micro-batch.

    Attributes:
        blocks: none of them empty.
        query_starts: i64[C], where each stretch's queries start in the query slots of all blocks laid end to end.
        key_starts: i64[C], where its keys start in the key slots.
    """

    blocks: tuple[Block, ...]
    query_starts: Tensor
    key_starts: Tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotary embedding of each token: channels i and i + D/2 are turned by the i-th angle.

    Attributes:
        cos: [S, 1, D], each angle twice.
        sin: [S, 1, D], the first half of the channels with the sign turned.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def by(cls, angles: Tensor, dtype: torch.dtype) -> "Rotation":
        """By f32[S, D/2], for queries and keys of `dtype`."""
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return cls(torch.cat([cos, cos], dim=-1).unsqueeze(1), torch.cat([-sin, sin], dim=-1).unsqueeze(1))

    def __call__(self, heads: Tensor) -> Tensor:
        """[S, heads, D], turned; of the heads themselves nothing is kept for the backward pass."""
        return heads * self.cos + heads.roll(heads.shape[-1] // 2, -1) * self.sin


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """What each layer's core attention needs to know of a micro-batch; made once per forward pass.

    Takes the place of Megatron's PackedSeqParams, of which its attention layer reads `qkv_format` only.

    Attributes:
        packed: the micro-batch.
        rotation: of queries and keys; Megatron would compute it anew for both in each layer.
        qkv_format: never "thd", which means something else to Megatron.
        blocks: padded blocks; empty when the varlen kernel is used.
        query_slots: i64[S], each query's row in the blocks laid end to end.
        key_slots: i64[K], each key's row; K = S where each stretch attends to itself.
    """

    packed: Packed
    rotation: Rotation
    qkv_format: str = "sbhd"
    blocks: tuple[Block, ...] = ()
    query_slots: Tensor | None = None
    key_slots: Tensor | None = None


def attention_input(packed: Packed, dtype: torch.dtype, angles: Tensor) -> AttentionInput:
    """Plans the attention of a micro-batch for weights of `dtype`; `angles` f32[S, D/2] are those of the rotation."""
    rotation = Rotation.by(angles, dtype)
    if packed.tokens.is_cuda and dtype in (torch.bfloat16, torch.float16):
        return AttentionInput(packed, rotation)
    device = packed.tokens.device
    bounds = packed.cu_seqlens.to("cpu", torch.int64)
    key_bounds = bounds if packed.keys is None else packed.keys.cu_seqlens.to("cpu", torch.int64)
    plan = plan_blocks(bounds.diff(), key_bounds.diff(), device)
    query_slots = _slots(bounds, plan.query_starts).to(device)
    key_slots = query_slots if packed.keys is None else _slots(key_bounds, plan.key_starts).to(device)
    return AttentionInput(packed, rotation, blocks=plan.blocks, query_slots=query_slots, key_slots=key_slots)


def _slots(bounds: Tensor, starts: Tensor) -> Tensor:
    """Each row's slot, for stretches between `bounds` that begin at slots `starts`."""
    return torch.arange(int(bounds[-1])) + (starts - bounds[:-1]).repeat_interleave(bounds.diff())


def plan_blocks(lengths: Tensor, key_lengths: Tensor, device: torch.device) -> Blocks:
    """Groups stretches with about as many keys.

    Args:
        lengths: i64[C], queries of each stretch, on the CPU.
        key_lengths: i64[C], its keys, at least as many; the last `lengths` of them are those of the queries themselves.
        device: of the masks.
    """
    query_starts, key_starts = torch.zeros_like(lengths), torch.zeros_like(lengths)
    order = key_lengths.argsort(descending=True, stable=True)
    order = order[lengths[order] > 0]
    sizes = key_lengths[order].tolist()
    blocks: list[Block] = []
    queries = keys = first = 0
    while first < len(order):
        last = first
        while last < len(order) and sizes[last] * LONGEST_TO_SHORTEST >= sizes[first]:
            last += 1
        rows = order[first:last]
        count, length, width = last - first, int(lengths[rows].max()), sizes[first]
        query_starts[rows] = queries + length * torch.arange(count)
        key_starts[rows] = keys + width * torch.arange(count)
        blocks.append(Block(count, length, width, _visible(lengths[rows], key_lengths[rows], device)))
        queries, keys, first = queries + count * length, keys + count * width, last
    return Blocks(tuple(blocks), query_starts, key_starts)


def _visible(lengths: Tensor, key_lengths: Tensor, device: torch.device) -> Tensor | None:
    """See `Block.visible`. Queries that are padding see some key as well: softmax over none would be NaN."""
    before = key_lengths - lengths
    if not bool(before.any()):
        return None
    last_seen = before[:, None, None, None] + torch.arange(int(lengths.max()))[:, None]
    return (torch.arange(int(key_lengths.max())) <= last_seen).to(device)


class _Scatter(torch.autograd.Function):
    """Rows into distinct slots of a zero tensor. Its own pair of functions, because torch's backward of an indexed read
    accumulates row by row, which distinct slots do not need."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor, num_slots: int) -> Tensor:
        """[S, ...] to [num_slots, ...]."""
        ctx.save_for_backward(slots)
        return rows.new_zeros(num_slots, *rows.shape[1:]).index_copy_(0, slots, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of each row is that of its slot."""
        (slots,) = ctx.saved_tensors
        return grads[0].index_select(0, slots), None, None


class _Gather(torch.autograd.Function):
    """The inverse of `_Scatter`."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, slots: Tensor) -> Tensor:
        """[num_slots, ...] to [S, ...]."""
        ctx.save_for_backward(slots)
        ctx.num_slots = len(padded)
        return padded.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Padding gets no gradient."""
        (slots,) = ctx.saved_tensors
        zeros = grads[0].new_zeros(ctx.num_slots, *grads[0].shape[1:])
        return zeros.index_copy_(0, slots, grads[0]), None


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    blocks: tuple[Block, ...],
    query_slots: Tensor,
    key_slots: Tensor,
    scale: float | None,
) -> Tensor:
    """Causal attention of each stretch to its keys, through right-padded blocks.

    Args:
        query: [S, H, D].
        key: [K, G, D], those of each stretch laid end to end.
        value: [K, G, D].
        blocks: see `plan_blocks`.
        query_slots: i64[S], each query's row in the blocks laid end to end.
        key_slots: i64[K], each key's.
        scale: of the scores; None means 1 / sqrt(D).

    Returns:
        [S, H, D].
    """
    sizes = [block.count * block.length for block in blocks]
    key_sizes = [block.count * block.keys for block in blocks]
    parts = [
        _Scatter.apply(query, query_slots, sum(sizes)).split(sizes),
        _Scatter.apply(key, key_slots, sum(key_sizes)).split(key_sizes),
        _Scatter.apply(value, key_slots, sum(key_sizes)).split(key_sizes),
    ]
    outputs = []
    for block, *part in zip(blocks, *parts, strict=True):
        q, k, v = (rows.view(block.count, -1, *rows.shape[1:]).transpose(1, 2) for rows in part)
        short = block.keys <= SHORT and q.device.type == "cpu"
        out = (_short_attention if short else _fused_attention)(q, k, v, block.visible, scale)
        outputs.append(out.transpose(1, 2).reshape(block.count * block.length, *query.shape[1:]))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _Gather.apply(joined, query_slots)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float | None) -> Tensor:
    """[count, H, length, D] for `query` of that shape, `key` and `value` [count, G, keys, D]; see `Block.visible`."""
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, is_causal=visible is None, scale=scale
    )


def _short_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float | None) -> Tensor:
    """The same by two products, in which the query heads that share a key head are rows of one matrix."""
    count, heads, length, width = query.shape
    grouped = count, key.shape[1], -1
    if visible is None:
        visible = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril_()
    scores = torch.matmul(query.reshape(*grouped, width), key.transpose(-1, -2)).view(count, heads, length, -1)
    unseen = torch.zeros_like(visible, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
    shares = torch.add(unseen, scores, alpha=width**-0.5 if scale is None else scale).softmax(-1)
    return torch.matmul(shares.view(*grouped, key.shape[2]), value).view(query.shape)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, *, packed: Packed, scale: float | None) -> Tensor:
    """The same with torch's flash attention (CUDA, 16 bit), whose causal mask ends queries and keys together.

    Called by its operator: `torch.nn.attention.varlen`, which wraps it from torch 2.10 on, has had another signature in
    each version, and some of them refuse query heads that share key heads, which the operator takes.
    """
    keys = packed.keys
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        packed.cu_seqlens,
        packed.cu_seqlens if keys is None else keys.cu_seqlens,
        packed.max_length,
        packed.max_length if keys is None else keys.max_length,
        0.0,  # dropout
        True,  # causal
        False,  # no mask to debug
        scale=scale,
    )[0]


def gather_keys(key: Tensor, value: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """Keys and values [K, G, D] of all stretches, from those [S, G, D] of this rank's tokens.

    Gradients flow back to the ranks that they came from.
    """
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    # One collective for both.
    joined = torch.cat([key, value], dim=-1)
    everywhere: Tensor = gather_from_sequence_parallel_region(joined, group=keys.group)
    wanted = everywhere.index_select(0, keys.rows)
    width = key.shape[-1]
    return wanted[..., :width].contiguous(), wanted[..., width:].contiguous()


class PackedAttention(nn.Module):
    """Megatron core attention for packed causal sequences."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **_placement: Any) -> None:
        """Takes what Megatron gives to a core attention; only the scale matters here.

        Args:
            config: the layer's transformer config.
            softmax_scale: of the scores; None means 1 / sqrt(D).
            _placement: layer number, mask type and process groups, which packed causal attention does not need.
        """
        super().__init__()
        assert config.attention_dropout == 0.0, "packed attention has no dropout"
        self._scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: AttentionInput,
        **_unused: Any,
    ) -> Tensor:
        """Attention of query [S, 1, H, D] to key and value [S, 1, G, D]; returns [S, 1, H*D]."""
        query, key, value = (tensor.squeeze(1) for tensor in (query, key, value))
        plan = packed_seq_params
        query, key = plan.rotation(query), plan.rotation(key)
        if plan.packed.keys is not None:
            key, value = gather_keys(key, value, plan.packed.keys)
        if plan.query_slots is None:
            out = varlen_attention(query, key, value, packed=plan.packed, scale=self._scale)
        else:
            assert plan.key_slots is not None, "queries and keys are planned together"
            slots = {"query_slots": plan.query_slots, "key_slots": plan.key_slots}
            out = padded_attention(query, key, value, blocks=plan.blocks, **slots, scale=self._scale)
        return out.reshape(len(out), 1, -1)
