"""Log-probs of given tokens, and entropy, from vocabulary-parallel logits, without a copy of the logits in fp32.

M = positions, V = vocabulary, P = columns of this rank (V padded and divided by the tensor-parallel ranks).

For logits z and temperature T, x = z / T: log p(i) = x_i - lse(x), entropy H = -sum_i p_i log p_i.
Gradients: d log p(j) / dx_i = [i = j] - p_i;  dH / dx_i = -p_i (log p_i + H).
The backward pass computes the probabilities anew from the logits and the saved lse.

The same mathematics, two devices: on CUDA a kernel reads each row once (see `opd_trainer.megatron.log_probs_cuda`). On
a CPU, and in fp64, both passes walk over the positions in chunks of torch operations; one chunk at a time is in fp32.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup, ReduceOp

from opd_trainer.megatron.c_compiler import c_compiler

Reduce = Callable[[Tensor, ReduceOp.RedOpType], Tensor]
"""Reduces a tensor over the ranks that share the vocabulary; may do so in place."""


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """The part of the vocabulary that this rank's logits are about.

    Attributes:
        first: vocabulary id of the first column.
        columns: columns that mean something; those behind them are padding and take no probability.
        reduce: over the ranks that share the vocabulary.
    """

    first: int
    columns: int
    reduce: Reduce


def token_log_probs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    chunk_tokens: int,
    tp_group: ProcessGroup | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and entropy of the distributions that produced them.

    Args:
        logits: [M, P] of this rank, any float dtype.
        targets: i64[M], the same on each rank of `tp_group`.
        temperature: > 0; logits are divided by it.
        vocab_size: ids that mean something; columns of ids at or above it are padding.
        chunk_tokens: positions whose logits are in fp32 at a time, where no kernel does without.
        tp_group: ranks that share the vocabulary; None when this rank has all of it.
        entropy_gradient: whether gradients flow through the entropy.

    Returns:
        Log-probs f32[M] and entropy f32[M] in nats (f64 for f64 logits). A -inf logit is a token of probability 0; a
        NaN logit makes its own position NaN and no other.
    """
    shard = vocabulary_shard(logits.shape[1], vocab_size, tp_group)
    return _TokenLogProbs.apply(logits, targets, temperature, chunk_tokens, shard, entropy_gradient)


def vocabulary_shard(columns: int, vocab_size: int, tp_group: ProcessGroup | None) -> VocabularyShard:
    """This rank's part of a vocabulary that is cut into equal shards of `columns` columns."""
    if tp_group is None or tp_group.size() == 1:
        return VocabularyShard(0, min(columns, vocab_size), lambda tensor, _op: tensor)

    def reduce(tensor: Tensor, op: ReduceOp.RedOpType) -> Tensor:
        distributed.all_reduce(tensor, op, group=tp_group)
        return tensor

    first = tp_group.rank() * columns
    return VocabularyShard(first, max(0, min(columns, vocab_size - first)), reduce)


class _TokenLogProbs(torch.autograd.Function):
    """See `token_log_probs`."""

    @staticmethod
    def forward(  # torch passes them by position
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        chunk_tokens: int,
        shard: VocabularyShard,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy."""
        compute = _by_kernel if _has_kernel(logits) else partial(_by_chunks, chunk_tokens=chunk_tokens)
        log_probs, entropy, lse = compute(logits, targets, temperature, shard)
        ctx.save_for_backward(logits, targets, lse, entropy)
        ctx.settings = temperature, chunk_tokens, shard, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of this rank's logits, in their dtype."""
        logits, targets, lse, entropy = ctx.saved_tensors
        temperature, chunk_tokens, shard, entropy_gradient = ctx.settings
        upstream = grads[0], grads[1] if entropy_gradient else None
        if _has_kernel(logits):
            from opd_trainer.megatron.log_probs_cuda import gradient

            place = {"first": shard.first, "columns": shard.columns}
            found = gradient(logits, targets, lse, entropy, upstream, **place, temperature=temperature)
        else:
            found = _gradient_by_chunks(logits, targets, lse, entropy, upstream, shard, temperature, chunk_tokens)
        return found, None, None, None, None, None


def _has_kernel(logits: Tensor) -> bool:
    return logits.is_cuda and logits.dtype != torch.float64 and _triton_builds()


@cache
def _triton_builds() -> bool:
    """Whether Triton, which torch's builds for CUDA bring, can build kernels; their launchers need a C compiler."""
    if find_spec("triton") is None:
        return False
    compiler = c_compiler()
    if compiler is not None:
        # A plain cc it would not find by itself.
        os.environ.setdefault("CC", compiler)
        return True
    warnings.warn(
        "Triton finds no C compiler: log-probs are computed without its kernel, which takes many times as long. "
        "Install gcc, or name a compiler in CC",
        stacklevel=2,
    )
    return False


def _by_kernel(logits: Tensor, targets: Tensor, temperature: float, shard: VocabularyShard) -> tuple[Tensor, ...]:
    """Log-probs, entropy and lse, from sums over this shard that are relative to its own largest logit."""
    from opd_trainer.megatron.log_probs_cuda import statistics

    own, mass, weighted, target = statistics(
        logits, targets, first=shard.first, columns=shard.columns, temperature=temperature
    )
    largest = shard.reduce(own.clone(), ReduceOp.MAX)
    shift = torch.where(own > -torch.inf, own - largest, 0.0)
    scale = shift.exp()
    _, present = _column(targets - shard.first, shard.columns)
    sums = torch.stack(
        [
            mass * scale,
            torch.where(scale > 0, scale * (weighted + shift * mass), 0.0),
            torch.where(present, target - largest, 0.0),
        ]
    )
    return _finish(shard.reduce(sums, ReduceOp.SUM), largest)


def _by_chunks(
    logits: Tensor, targets: Tensor, temperature: float, shard: VocabularyShard, chunk_tokens: int
) -> tuple[Tensor, ...]:
    """The same in torch operations."""
    results = logits.new_empty(3, len(logits), dtype=_compute_dtype(logits))
    for rows in _chunks(len(logits), chunk_tokens):
        scaled = _scaled(logits[rows], temperature, shard)
        results[:, rows] = torch.stack(_forward_chunk(scaled, targets[rows] - shard.first, shard))
    return results.unbind()


def _gradient_by_chunks(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    upstream: tuple[Tensor, Tensor | None],
    shard: VocabularyShard,
    temperature: float,
    chunk_tokens: int,
) -> Tensor:
    """The gradient of the logits from those of log-probs and entropy, in torch operations."""
    of_log_probs, of_entropy = upstream
    grad_logits = torch.zeros_like(logits)
    if of_entropy is None and not bool(of_log_probs.any()):
        # The loss is about other things, such as whole distributions: no pass over the vocabulary for nothing.
        return grad_logits
    for rows in _chunks(len(logits), chunk_tokens):
        log_p = _scaled(logits[rows], temperature, shard) - lse[rows, None]
        p = log_p.exp()
        grad = p * -of_log_probs[rows, None]
        if of_entropy is not None:
            # Where p is 0, p * log p is 0 in the limit, but not in floating point.
            slope = torch.where(p > 0, p * (log_p + entropy[rows, None]), 0.0)
            grad = grad - of_entropy[rows, None] * slope
        column, present = _column(targets[rows] - shard.first, shard.columns)
        if shard.columns:
            grad.scatter_add_(1, column[:, None], torch.where(present, of_log_probs[rows], 0.0)[:, None])
        grad_logits[rows, : shard.columns] = (grad / temperature).to(logits.dtype)
    return grad_logits


def _finish(sums: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy and lse from the whole vocabulary's sums relative to its largest logit."""
    mass, weighted, target = sums
    log_mass = mass.log()
    return target - log_mass, log_mass - weighted / mass, log_mass + largest


def _forward_chunk(scaled: Tensor, targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy and lse of a chunk; `targets` count from this shard's first column."""
    count = len(scaled)
    largest = scaled.amax(1) if shard.columns else scaled.new_full((count,), -torch.inf)
    largest = shard.reduce(largest, ReduceOp.MAX)
    shifted = scaled - largest[:, None]
    weights = shifted.exp()
    column, present = _column(targets, shard.columns)
    target = shifted.gather(1, column[:, None])[:, 0] if shard.columns else shifted.new_zeros(count)
    sums = torch.stack(
        [
            weights.sum(1),
            torch.where(weights > 0, weights * shifted, 0.0).sum(1),
            torch.where(present, target, 0.0),
        ]
    )
    return _finish(shard.reduce(sums, ReduceOp.SUM), largest)


def _scaled(logits: Tensor, temperature: float, shard: VocabularyShard) -> Tensor:
    """Logits of the columns that mean something, in the dtype of the computation, over the temperature."""
    return logits[:, : shard.columns].to(_compute_dtype(logits)) / temperature


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _column(targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Each target's column, and whether it is one of this shard's (otherwise the column is a valid one to read)."""
    present = (targets >= 0) & (targets < columns)
    return torch.where(present, targets, 0), present


def _chunks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, total, size))
