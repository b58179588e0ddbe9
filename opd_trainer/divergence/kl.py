"""Divergences between two distributions given by their log-probs, differentiable in the student's.

T = positions, V = categories of this rank. A category that both give -inf (a padding id) counts for nothing, in value
and in gradient. One that the teacher gives -inf and the student does not makes the reverse KL infinite, as it is.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from opd_trainer.vocabulary import WHOLE, VocabularyShards


def reverse_kl(
    student: Float[Tensor, "T V"], teacher: Float[Tensor, "T V"], shards: VocabularyShards = WHOLE
) -> Float[Tensor, " T"]:
    """KL(student || teacher) = sum_v p_s (log p_s - log p_t)."""
    return shards.total(_weighted_log_ratio(student, teacher).sum(-1))


def forward_kl(
    student: Float[Tensor, "T V"], teacher: Float[Tensor, "T V"], shards: VocabularyShards = WHOLE
) -> Float[Tensor, " T"]:
    """KL(teacher || student) = sum_v p_t (log p_t - log p_s)."""
    return shards.total(_weighted_log_ratio(teacher, student).sum(-1))


def jsd(
    student: Float[Tensor, "T V"], teacher: Float[Tensor, "T V"], beta: float, shards: VocabularyShards = WHOLE
) -> Float[Tensor, " T"]:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta p_t + (1 - beta) p_s (GKD, arXiv 2306.13649).

    The formula is 0 at both ends; there it is replaced by its limits after division by beta and 1 - beta: the forward
    KL at 0 and the reverse KL at 1.
    """
    if beta == 0:
        return forward_kl(student, teacher, shards)
    if beta == 1:
        return reverse_kl(student, teacher, shards)
    known = torch.isfinite(student) | torch.isfinite(teacher)
    floor = torch.finfo(student.dtype).min / 2
    mixture = torch.logaddexp(
        torch.where(known, student.clamp_min(floor), 0.0) + math.log1p(-beta),
        torch.where(known, teacher.clamp_min(floor), 0.0) + math.log(beta),
    )
    towards_teacher = _weighted_log_ratio(teacher, mixture)
    towards_student = _weighted_log_ratio(student, mixture)
    return shards.total((beta * towards_teacher + (1 - beta) * towards_student).sum(-1))


def _weighted_log_ratio(p: Float[Tensor, "T V"], q: Float[Tensor, "T V"]) -> Float[Tensor, "T V"]:
    """p (log p - log q), 0 where p is 0; entries are replaced before arithmetic, so that no gradient is NaN."""
    positive = p > -math.inf
    log_p = torch.where(positive, p, 0.0)
    return torch.where(positive, log_p.exp() * (log_p - torch.where(positive, q, 0.0)), 0.0)
