"""How far student and teacher agree on the likeliest tokens, from the k candidates of each at every position.

R = positions, k = candidates.
"""

import torch
from torch import Tensor

from opd_trainer.metrics import Metrics
from opd_trainer.types import TopK


def overlap_metrics(student: TopK, teacher: TopK) -> Metrics:
    """opd/overlap_ratio, opd/teacher_mass_on_student_topk and opd/agreement_at_1, means over the R positions.

    overlap_ratio: |topk_s and topk_t| / k.
    teacher_mass_on_student_topk: teacher's probability of the student's k candidates, as far as they are among the
    teacher's own k: a lower bound, tight where the overlap is large.
    agreement_at_1: share of positions where both like the same token best.

    Args:
        student: i64[R, k] and f32[R, k].
        teacher: the same shapes.
    """
    metrics = Metrics()
    positions = len(student.ids)
    if positions == 0:
        return metrics
    shared = common(student, teacher)
    mass = torch.where(shared, teacher.log_probs, -torch.inf).exp().sum(-1)
    metrics.put("opd/overlap_ratio", shared.float().mean(), positions)
    metrics.put("opd/teacher_mass_on_student_topk", mass.mean(), positions)
    return metrics.put("opd/agreement_at_1", (student.ids[:, 0] == teacher.ids[:, 0]).float().mean(), positions)


def common(student: TopK, teacher: TopK) -> Tensor:
    """bool[R, k]: which of the teacher's candidates are also the student's."""
    return (teacher.ids.unsqueeze(-1) == student.ids.unsqueeze(-2)).any(-1)
