"""Divergences from k candidates per position, for teachers that cannot hand over a whole distribution.

T = positions, K = candidates. Without the tail, k candidates are no distribution: their "KL" can be negative, and
renormalising them can turn the gradient around. Both are left out on purpose.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def with_tail(log_probs: Float[Tensor, "T K"]) -> Float[Tensor, "T K+1"]:
    """The candidates and one bucket for everything else, log(1 - sum_k p_k): a distribution over k + 1 categories.

    Any divergence of it is a lower bound of the full one (data processing). Use the student's top k for the reverse KL
    and the teacher's for the forward KL, with both models' log-probs at the same candidates.
    """
    # Rounding may push the sum to 1 and beyond.
    mass = torch.logsumexp(log_probs, -1, keepdim=True).clamp(max=-torch.finfo(log_probs.dtype).eps)
    return torch.cat([log_probs, torch.log(-torch.expm1(mass))], -1)


def student_topk_sampled_tail(
    student: Float[Tensor, "T K"],
    teacher: Float[Tensor, "T K"],
    sampled_student: Float[Tensor, " T"],
    sampled_teacher: Float[Tensor, " T"],
    sampled_in_topk: Bool[Tensor, " T"],
) -> Float[Tensor, " T"]:
    """A loss whose expected gradient is exactly that of the reverse KL, from k candidates and the sampled token.

    sum over the student's top k of p_s (log p_s - log p_t), plus sg(s - t + 1) s where the sampled token is outside:
    the score function of the rest of the sum. Its value is not a KL.

    Args:
        student: log-probs of the student's k likeliest tokens.
        teacher: the teacher's log-probs of the same tokens.
        sampled_student: s, the student's log-prob of the token that it sampled itself, at this position.
        sampled_teacher: t, the teacher's.
        sampled_in_topk: whether the sampled token is among the k.
    """
    inside = (student.exp() * (student - teacher)).sum(-1)
    score = (sampled_student - sampled_teacher + 1.0).detach() * sampled_student
    return inside + torch.where(sampled_in_topk, 0.0, score)
