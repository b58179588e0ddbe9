"""What the distillation did, computed by the controller from the log-probs of one update.

T = tokens, N = sequences. "Valid" tokens are unmasked and have a finite teacher log-prob.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from opd_trainer import jagged
from opd_trainer.loss.kl import k3
from opd_trainer.metrics import Metrics
from opd_trainer.types import TokenBatch

NUM_DECILES = 10
ROUNDING = 1e-6
"""Nats that float32 rounding may account for."""


def valid_tokens(teacher: Float[Tensor, " T"], mask: Bool[Tensor, " T"]) -> Bool[Tensor, " T"]:
    """Unmasked tokens that the teacher scored."""
    return mask & torch.isfinite(teacher)


def opd_metrics(
    student: Float[Tensor, " T"], teacher: Float[Tensor, " T"], mask: Bool[Tensor, " T"], batch: TokenBatch
) -> Metrics:
    """opd/reverse_kl (mean, nats per token), its 95th percentile, k3, log-probs, KL by decile of the response, EOS gap;
    nothing where no token is valid.

    Args:
        student: [T] live student log-probs.
        teacher: [T] teacher log-probs, NaN where unknown.
        mask: [T] unmasked tokens.
        batch: the tokens that they belong to.
    """
    valid = valid_tokens(teacher, mask)
    reverse_kl = torch.where(valid, student - teacher, 0.0)
    metrics = Metrics()
    if not bool(valid.any()):
        return metrics
    count = int(valid.sum())
    metrics.mean("opd/reverse_kl", reverse_kl, valid)
    metrics.put("opd/reverse_kl_p95", percentile(reverse_kl[valid], 0.95), count)
    metrics.mean("opd/k3", k3(reverse_kl), valid)
    metrics.mean("opd/student_log_prob", student, valid).mean("opd/teacher_log_prob", teacher, valid)
    decile = deciles(batch.seq, mask, batch.num_sequences)
    for number in range(NUM_DECILES):
        chosen = valid & (decile == number)
        if bool(chosen.any()):
            metrics.mean(f"opd/kl_by_position/{number}", reverse_kl, chosen)
    # The EOS of the sequences that stopped by themselves.
    last = valid & jagged.last_of(batch.seq, mask, batch.num_sequences) & ~batch.truncated[batch.seq]
    return metrics.mean("opd/eos_gap", reverse_kl, last) if bool(last.any()) else metrics


def likeness(
    student: Float[Tensor, " T"], teacher: Float[Tensor, " T"], rollout: Float[Tensor, " T"], mask: Bool[Tensor, " T"]
) -> str | None:
    """A warning when the teacher cannot be told from the student: they differ as little as two computations of the same
    model do; None otherwise.

    Args:
        student: [T] live log-probs before the first update.
        teacher: [T] teacher log-probs, NaN where unknown.
        rollout: [T] the engine's log-probs under the same weights, NaN where unknown.
        mask: [T] unmasked tokens.
    """
    valid = valid_tokens(teacher, mask)
    if not bool(valid.any()):
        return None
    gap = float((student - teacher)[valid].abs().mean())
    known = valid & torch.isfinite(rollout)
    floor = float((student - rollout)[known].abs().mean()) if bool(known.any()) else 0.0
    if gap > 2 * floor + ROUNDING:
        return None
    return (
        f"THE TEACHER CANNOT BE TOLD FROM THE STUDENT: before the first update their log-probs differ by {gap:.2g} "
        f"nats a token, those of engine and trainer under the same weights by {floor:.2g}. There is nothing to distil. "
        "Unless this is a control run, see whether teacher.load and teacher.ckpt_step name the student's own weights"
    )


def percentile(values: Float[Tensor, " M"], fraction: float) -> float:
    """The smallest value that is >= `fraction` of all values (nearest rank; any size)."""
    rank = max(1, -int(-fraction * len(values) // 1))
    return float(values.kthvalue(rank).values)


def deciles(seq: Int64[Tensor, " T"], mask: Bool[Tensor, " T"], num_sequences: int) -> Int64[Tensor, " T"]:
    """Which tenth (0..9) of its sequence's unmasked tokens each unmasked token lies in."""
    count = jagged.count_by(seq, mask, num_sequences).clamp_min(1)[seq]
    return jagged.rank_of(seq, mask, num_sequences) * NUM_DECILES // count


def advantage_share(base: Float[Tensor, " T"], final: Float[Tensor, " T"], valid: Bool[Tensor, " T"]) -> float:
    """Sum |OPD term| / (sum |A_base| + sum |OPD term|) over valid tokens; 0 when both are 0.

    Args:
        base: [T] advantage without the term.
        final: [T] advantage with the term.
        valid: [T] tokens with a term.
    """
    term = torch.where(valid, final - base, 0.0).abs().sum(dtype=torch.float64)
    task = torch.where(valid, base, 0.0).abs().sum(dtype=torch.float64)
    total = float(term + task)
    return float(term) / total if total else 0.0
