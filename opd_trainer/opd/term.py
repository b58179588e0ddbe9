"""The OPD term: the one place where a teacher's judgement meets an advantage.

T = tokens. reverse_kl[t] = sg(log p_student(y_t)) - log p_teacher(y_t), positive where the student likes a token better
than the teacher does, hence subtracted. With y ~ student its score-function gradient is exactly the gradient of
KL(student || teacher) at each prefix.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_trainer.errors import TeacherError
from opd_trainer.opd.config import OpdConfig
from opd_trainer.opd.weights import token_weights
from opd_trainer.types import TokenBatch


def subtract_opd_term(
    advantage: Float[Tensor, " T"],
    student: Float[Tensor, " T"],
    teacher: Float[Tensor, " T"],
    batch: TokenBatch,
    *,
    opd: OpdConfig,
    kl_coef: float,
) -> Float[Tensor, " T"]:
    """A - kl_coef * opd_weight * w * reverse_kl, where the token is unmasked and the teacher valid; A elsewhere.

    With `kl_coef` 0 the advantage is returned as it is, so that it equals a run without OPD bit for bit.

    Args:
        advantage: [T] base advantage.
        student: [T] student log-probs; no gradient flows through them.
        teacher: [T] teacher log-probs at the same temperature.
        batch: the tokens, with `mask` and `opd_weight`.
        opd: clipping, trust region and token weights.
        kl_coef: strength at this step.

    Raises:
        TeacherError: the teacher gave no finite log-prob for a token that counts.
    """
    if kl_coef == 0:
        return advantage
    assert batch.opd_weight is not None
    valid = batch.mask & (batch.opd_weight != 0)
    unknown = valid & ~torch.isfinite(teacher)
    if bool(unknown.any()):
        raise TeacherError(
            f"the teacher gave no finite log-prob for {int(unknown.sum())} of {int(valid.sum())} tokens that count in "
            "the OPD term"
        )
    reverse_kl = opd_penalty(opd, student.detach(), teacher, valid)
    weight = batch.opd_weight * token_weights(opd.weights, reverse_kl, valid, batch)
    return advantage - torch.where(valid, kl_coef * weight * reverse_kl, 0.0)


def opd_penalty(
    opd: OpdConfig, student: Float[Tensor, " T"], teacher: Float[Tensor, " T"], valid: Bool[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """The reverse KL of each token after trust region and clipping, 0 where not valid.

    Trust region: -log(alpha p_teacher / p_student + 1 - alpha) (TrOPD, arXiv 2606.01249), which never exceeds
    -log(1 - alpha) and is s - t at alpha = 1.
    """
    reverse_kl = torch.where(valid, student, 0.0) - torch.where(valid, teacher, 0.0)
    if opd.trust_alpha < 1:
        log_share = torch.full_like(reverse_kl, math.log1p(-opd.trust_alpha))
        reverse_kl = -torch.logaddexp(math.log(opd.trust_alpha) - reverse_kl, log_share)
    return reverse_kl if opd.clip is None else reverse_kl.clamp(-opd.clip, opd.clip)


def opd_weights(weight: Float[Tensor, " T"], valid: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    """The factor `TokenBatch.opd_weight`: 0 where not valid, elsewhere (sum of weights) / (sum of valid weights).

    The term's weighted mean is then a mean over valid tokens: tokens that the teacher could not score leave numerator
    and denominator, and keep their base advantage. It is exactly 1 when all are valid, and 0 when none is.

    Args:
        weight: [T] loss weights, 0 where masked.
        valid: [T] unmasked tokens with a teacher log-prob.
    """
    share = torch.where(valid, weight, 0.0).sum()
    return torch.where(valid & (share > 0), weight.sum() / torch.where(share > 0, share, 1.0), 0.0)
