"""Core attention over packed sequences on plain torch, plugged into Megatron's layer spec.

S = tokens of a micro-batch, laid end to end; N = sequences; H = query heads, G = key/value heads, D = head width.

Two ways, chosen by device and number format:

* varlen: `torch.nn.attention.varlen`, on CUDA in 16 bit. No padding.
* padded: everywhere else. Sequences of similar length are scattered into right-padded rows; with a causal mask a real
  query never sees the padding behind it, so no mask is needed and SDPA may use its fused causal kernel.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LONGEST_TO_SHORTEST = 2.0
"""Sequences share a padded block while the longest has at most this multiple of the shortest one's length: at most half
of the block's attention rows are padding, and a micro-batch needs few kernel launches."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A micro-batch as a model takes it, on its device.

    Attributes:
        tokens: i64[S].
        position_ids: i64[S], position of each token inside its sequence.
        cu_seqlens: i32[N+1], where each sequence starts; the last entry is S.
        max_length: the longest sequence, tokens.
        select: i64[M], the positions whose logits are wanted.
    """

    tokens: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_length: int
    select: Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """A right-padded block of sequences: `count` rows of `length` slots."""

    count: int
    length: int


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """What each layer's core attention needs to know of a micro-batch; made once per forward pass.

    Takes the place of Megatron's PackedSeqParams, of which its attention layer reads `qkv_format` only.

    Attributes:
        qkv_format: never "thd", with which Megatron would cut the micro-batch into sequences in each layer to apply the
            rotary embedding; it is given the angles of each token instead.
        blocks: padded blocks; empty when the varlen kernel is used.
        slots: i64[S], each token's row in the blocks laid end to end.
        cu_seqlens: i32[N+1].
        max_length: the longest sequence, tokens.
    """

    qkv_format: str = "sbhd"
    blocks: tuple[Block, ...] = ()
    slots: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_length: int = 0


def attention_input(packed: Packed, dtype: torch.dtype) -> AttentionInput:
    """Plans the attention of a micro-batch for weights of `dtype`."""
    if packed.tokens.is_cuda and dtype in (torch.bfloat16, torch.float16):
        return AttentionInput(cu_seqlens=packed.cu_seqlens, max_length=packed.max_length)
    lengths = packed.cu_seqlens.diff().to("cpu", torch.int64)
    blocks, starts = plan_blocks(lengths)
    offsets = starts - packed.cu_seqlens[:-1].to("cpu", torch.int64)
    slots = torch.arange(int(lengths.sum())) + offsets.repeat_interleave(lengths)
    return AttentionInput(blocks=blocks, slots=slots.to(packed.tokens.device))


def plan_blocks(lengths: Tensor) -> tuple[tuple[Block, ...], Tensor]:
    """Groups sequences of similar length.

    Args:
        lengths: i64[N], on the CPU; zeros are allowed.

    Returns:
        The blocks, and i64[N]: where each sequence starts in the blocks laid end to end.
    """
    starts = torch.zeros_like(lengths)
    order = lengths.argsort(descending=True, stable=True).tolist()
    sizes = lengths.tolist()
    blocks: list[Block] = []
    used = first = 0
    while first < len(order) and sizes[order[first]] > 0:
        longest = sizes[order[first]]
        last = first
        while last < len(order) and sizes[order[last]] * LONGEST_TO_SHORTEST >= longest:
            starts[order[last]] = used + (last - first) * longest
            last += 1
        blocks.append(Block(count=last - first, length=longest))
        used += (last - first) * longest
        first = last
    return tuple(blocks), starts


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
    query: Tensor, key: Tensor, value: Tensor, *, blocks: tuple[Block, ...], slots: Tensor, scale: float | None
) -> Tensor:
    """Causal attention inside each sequence, through right-padded blocks.

    Args:
        query: [S, H, D].
        key: [S, G, D].
        value: [S, G, D].
        blocks: see `plan_blocks`.
        slots: i64[S], each token's row in the blocks laid end to end.
        scale: of the scores; None means 1 / sqrt(D).

    Returns:
        [S, H, D].
    """
    sizes = [block.count * block.length for block in blocks]
    num_slots = sum(sizes)
    parts = [_Scatter.apply(rows, slots, num_slots).split(sizes) for rows in (query, key, value)]
    outputs = []
    for block, *part in zip(blocks, *parts, strict=True):
        q, k, v = (rows.view(block.count, block.length, *rows.shape[1:]).transpose(1, 2) for rows in part)
        repeat = q.shape[1] // k.shape[1]
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        outputs.append(out.transpose(1, 2).reshape(block.count * block.length, *query.shape[1:]))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _Gather.apply(joined, slots)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, max_length: int, scale: float | None
) -> Tensor:
    """Causal attention inside each sequence with torch's varlen kernel (CUDA, 16 bit); shapes as `padded_attention`."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_length,
        max_length,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor), "no auxiliary output was asked for"
    return out


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
        rows = [tensor.squeeze(1) for tensor in (query, key, value)]
        plan = packed_seq_params
        if plan.slots is not None:
            out = padded_attention(*rows, blocks=plan.blocks, slots=plan.slots, scale=self._scale)
        else:
            assert plan.cu_seqlens is not None, "a plan has slots or cu_seqlens"
            out = varlen_attention(*rows, cu_seqlens=plan.cu_seqlens, max_length=plan.max_length, scale=self._scale)
        return out.reshape(len(out), 1, -1)
