"""How far student and teacher agree on the likeliest tokens, from the k candidates of each at every position.

R = positions, k = candidates.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from opd_trainer.metrics import Metrics
from opd_trainer.types import TopK

OVERLAP_NAMES = ("opd/overlap_ratio", "opd/teacher_mass_on_student_topk", "opd/agreement_at_1")
OVERLAP_COLUMNS = len(OVERLAP_NAMES)


def overlap(student: Int64[Tensor, "R k"], teacher: TopK) -> Float[Tensor, "R 3"]:
    """Of each position: |topk_s and topk_t| / k; the teacher's probability of the student's candidates, as far as they
    are among its own: a lower bound, tight where the overlap is large; 1 where both like the same token best.

    Args:
        student: candidates, likeliest first.
        teacher: as many, likeliest first.
    """
    shared = common(student, teacher)
    mass = torch.where(shared, teacher.log_probs, -torch.inf).exp().sum(-1)
    same = (student[:, 0] == teacher.ids[:, 0]).to(mass.dtype)
    return torch.stack([shared.to(mass.dtype).mean(-1), mass, same], -1)


def overlap_metrics(values: Float[Tensor, "R 3"]) -> Metrics:
    """opd/overlap_ratio, opd/teacher_mass_on_student_topk and opd/agreement_at_1: means over the positions that are
    known.

    Args:
        values: see `overlap`; NaN where unknown.
    """
    known = values[torch.isfinite(values).all(-1)]
    metrics = Metrics()
    if len(known):
        for name, mean in zip(OVERLAP_NAMES, known.mean(0).tolist(), strict=True):
            metrics.put(name, mean, len(known))
    return metrics


def common(student: Int64[Tensor, "R k"], teacher: TopK) -> Bool[Tensor, "R k"]:
    """Which of the teacher's candidates are also the student's."""
    return (teacher.ids.unsqueeze(-1) == student.unsqueeze(-2)).any(-1)
