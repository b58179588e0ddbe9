"""What `opd_trainer.megatron.log_probs` computes of each row of logits, on CUDA: one Triton kernel each way.

Logits are read once forward, and read once and written once backward, which is the least that can be done. Forward, one
program walks along a row; each of its lanes keeps sums of its own, relative to the largest logit of the row so far.
Backward, a program has a block of a row.

Triton's kernels run on the current device. `TRITON_INTERPRET=1` runs them on a CPU, to test what they compute.
"""

import torch
import triton  # pyright: ignore[reportMissingImports]  (torch's builds for a CPU come without it)
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = 4096
"""Columns that a program has in registers at a time: 16 for each thread of 8 warps."""
WARPS = 8


def statistics(logits: Tensor, targets: Tensor, *, first: int, columns: int, temperature: float) -> Tensor:
    """Of each row of x = logits / temperature: the largest x, sum exp(x - largest), sum exp(x - largest) (x - largest),
    and x of the target, 0 where the target is not among `columns`.

    Args:
        logits: [M, P] in 16 or 32 bit.
        targets: i64[M], ids.
        first: id of the first column.
        columns: that count; the others are padding.
        temperature: > 0.

    Returns:
        f32[4, M]. A row without columns or with -inf only gives -inf, 0, 0; NaN is in the sum of a row that has one.
    """
    rows = len(logits)
    found = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
    if rows:
        logits = _by_rows(logits)
        _statistics[(rows,)](  # pyright: ignore[reportIndexIssue]
            logits,
            targets.contiguous(),
            found,
            logits.stride(0),
            rows,
            first,
            1.0 / temperature,
            columns,
            BLOCK,
            num_warps=WARPS,
        )
    return found


def gradient(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grads: tuple[Tensor, Tensor | None],
    *,
    first: int,
    columns: int,
    temperature: float,
) -> Tensor:
    """The gradient of the logits, in their dtype, 0 in columns of padding.

    Args:
        logits: see `statistics`.
        targets: see `statistics`.
        lse: f32[M], log-sum-exp of x over the whole vocabulary.
        entropy: f32[M].
        grads: f32[M], of the log-probs of the targets, and of the entropy where it has one.
        first: see `statistics`.
        columns: see `statistics`.
        temperature: see `statistics`.
    """
    logits, (rows, width) = _by_rows(logits), logits.shape
    found = torch.empty(rows, width, dtype=logits.dtype, device=logits.device)
    of_log_probs, of_entropy = grads
    if rows and width:
        blocks = -(-width // BLOCK)
        _gradient[(rows * blocks,)](  # pyright: ignore[reportIndexIssue]
            logits,
            targets.contiguous(),
            lse.contiguous(),
            entropy.contiguous(),
            of_log_probs.contiguous(),
            entropy if of_entropy is None else of_entropy.contiguous(),
            found,
            logits.stride(0),
            width,
            blocks,
            first,
            columns,
            1.0 / temperature,
            of_entropy is not None,
            BLOCK,
            num_warps=WARPS,
        )
    return found


def _by_rows(logits: Tensor) -> Tensor:
    """With the columns of a row beside each other."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


@triton.jit
def _statistics(
    logits,
    targets,
    found,
    stride,
    rows,
    first,
    inverse_temperature,
    columns: tl.constexpr,  # of a model
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a row may start beyond 2^31
    logits += row * stride
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((), float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + lanes
        x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32) * inverse_temperature
        before = largest
        largest = tl.maximum(before, tl.max(x, 0))
        # Nothing but -inf so far: differences to it would be NaN.
        origin = tl.where(largest == float("-inf"), 0.0, largest)
        moved = tl.where(before == float("-inf"), 0.0, before - origin)
        kept = tl.exp(before - origin)
        shifted = x - origin
        weight = tl.exp(shifted)
        # Where a factor is 0, its product is 0 in the limit, but not in floating point.
        weighted = tl.where(kept > 0, kept * (weighted + moved * mass), 0.0)
        weighted += tl.where(weight > 0, weight * shifted, 0.0)
        mass = mass * kept + weight
    target = tl.load(targets + row) - first
    present = (target >= 0) & (target < columns)
    chosen = tl.load(logits + target, mask=present, other=0.0).to(tl.float32) * inverse_temperature
    tl.store(found + row, largest)
    tl.store(found + rows + row, tl.sum(mass, 0))
    tl.store(found + 2 * rows + row, tl.sum(weighted, 0))
    tl.store(found + 3 * rows + row, chosen)


@triton.jit
def _gradient(
    logits,
    targets,
    lse,
    entropy,
    grad_log_probs,
    grad_entropy,
    found,
    stride,
    width,
    blocks,
    first,
    columns,
    inverse_temperature,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    counts = column < columns
    x = tl.load(logits + row * stride + column, mask=counts, other=float("-inf")).to(tl.float32) * inverse_temperature
    log_p = x - tl.load(lse + row)
    p = tl.exp(log_p)
    upstream = tl.load(grad_log_probs + row)
    target = tl.load(targets + row) - first
    grad = tl.where(column == target, upstream, 0.0) - upstream * p
    if WITH_ENTROPY:
        slope = tl.where(p > 0, p * (log_p + tl.load(entropy + row)), 0.0)
        grad -= tl.load(grad_entropy + row) * slope
    tl.store(found + row * width + column, tl.where(counts, grad * inverse_temperature, 0.0), mask=column < width)
