"""How the tokens of a micro-batch are shared by context-parallel ranks, and results put together again.

T = tokens of the micro-batch, L = tokens of this rank (the same number on each, padding included), R = ranks.

With several ranks each sequence is cut into 2R stretches of about the same length, and rank r takes stretches r and
2R - 1 - r: with causal attention early queries see few keys and late ones many, so that every rank has about the same
work. A single rank has each sequence as one stretch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from opd_trainer import jagged


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank computes of a micro-batch. On the CPU.

    Attributes:
        tokens: i64[<= L], indices of its tokens in the micro-batch, ascending; padding follows them up to L.
        size: L.
        row: i64[T], each token's row among the tokens of its rank.
        mine: bool[T], the tokens of this rank.
        cu_seqlens: i32[C+1], where its stretches start; the padding is one of its own.
        keys: i64[K], what each stretch attends to, laid end to end; rows count the L tokens of each rank in turn.
        cu_keys: i32[C+1], where the keys of each stretch start.
    """

    tokens: Tensor
    size: int
    row: Tensor
    mine: Tensor
    cu_seqlens: Tensor
    keys: Tensor
    cu_keys: Tensor


def owners(lengths: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """The stretch of each token inside its sequence, and its rank: i64[T] each.

    Args:
        lengths: i64[N], tokens of each sequence.
        ranks: that share them.
    """
    stretches = 2 * ranks if ranks > 1 else 1
    stretch = (stretches * (jagged.positions(lengths) + 1) - 1) // lengths.repeat_interleave(lengths)
    return stretch, torch.minimum(stretch, stretches - 1 - stretch)


def tokens_per_rank(lengths: Tensor, ranks: int) -> int:
    """The most tokens that a rank has."""
    return int(owners(lengths, ranks)[1].bincount(minlength=ranks).max())


def share(lengths: Tensor, rank: int, ranks: int, size: int) -> Share:
    """What `rank` of `ranks` computes.

    Args:
        lengths: i64[N], tokens of each sequence, on the CPU.
        rank: which share.
        ranks: that share the sequences.
        size: tokens of each rank, at least `tokens_per_rank`.
    """
    stretch, owner = owners(lengths, ranks)
    counts = owner.bincount(minlength=ranks)
    order = owner.argsort(stable=True)
    row = torch.empty_like(order)
    row[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    mine = owner == rank
    tokens = mine.nonzero().squeeze(1)

    seq, positions = jagged.seq_from_lengths(lengths)[tokens], jagged.positions(lengths)[tokens]
    label = 2 * ranks * seq + stretch[tokens]
    _, queries = torch.unique_consecutive(label, return_counts=True)
    last = queries.cumsum(0) - 1
    num_keys = positions[last] + 1
    first = (lengths.cumsum(0) - lengths)[seq[last]]
    padding = torch.arange(len(tokens), size)
    keys = torch.cat([(owner * size + row)[_ranges(first, num_keys)], rank * size + padding])
    padded = [len(padding)] if len(padding) else []
    return Share(tokens, size, row, mine, _bounds(queries, padded), keys, _bounds(num_keys, padded))


def _ranges(first: Tensor, counts: Tensor) -> Tensor:
    """first[i], first[i] + 1, ... (counts[i] of them) for each i, laid end to end."""
    return jagged.positions(counts) + first.repeat_interleave(counts)


def _bounds(lengths: Tensor, more: list[int]) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths, lengths.new_tensor(more)]).cumsum(0).to(torch.int32)


class _Collect(torch.autograd.Function):
    """See `collect`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, total: int, group: ProcessGroup) -> Tensor:
        """Places this rank's values among those of all, by a sum with zeros elsewhere, which changes none of them."""
        ctx.save_for_backward(index)
        whole = values.new_zeros(total, *values.shape[1:]).index_copy_(0, index, values)
        distributed.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Every rank computes the same loss from the whole: the gradient of its own values is already complete."""
        (index,) = ctx.saved_tensors
        return grads[0].index_select(0, index), None, None, None


def collect(values: Tensor, index: Tensor, total: int, group: ProcessGroup) -> Tensor:
    """Values that ranks computed apart, on each of them.

    Differentiable under the premise that every rank of the group then computes the same loss: each passes back the
    gradient of its own values only, and gradients of weights are summed over the group.

    Args:
        values: [m, ...] of this rank.
        index: i64[m], their places among all.
        total: places; each belongs to one rank.
        group: the ranks.

    Returns:
        [total, ...].
    """
    return _Collect.apply(values, index, total, group)
