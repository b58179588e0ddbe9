"""Hand-computed OPD terms."""

import math

import pytest
import torch
from torch import Tensor

from opd_trainer.errors import TeacherError
from opd_trainer.opd.config import OpdConfig, OpdType, TokenWeights, WeightsConfig
from opd_trainer.opd.term import opd_weights, subtract_opd_term
from opd_trainer.types import TokenBatch
from tests.laws.options import NAN, batch_of

ADVANTAGE = torch.tensor([1.0, 0.0, 1.0, -1.0])
STUDENT = torch.tensor([-1.0, NAN, -2.0, -0.5])
TEACHER = torch.tensor([-3.0, NAN, -1.0, -0.5])


def batch(opd_weight: list[float]) -> TokenBatch:
    return batch_of([[1, 0, 1, 1]], prompt_tokens=0, opd_weight=torch.tensor(opd_weight))


def term(opd: OpdConfig, kl_coef: float = 0.5, opd_weight: list[float] | None = None) -> list[float]:
    tokens = batch(opd_weight or [1.0, 0.0, 1.0, 1.0])
    return subtract_opd_term(ADVANTAGE, STUDENT, TEACHER, tokens, opd=opd, kl_coef=kl_coef).tolist()


def test_golden() -> None:
    # s - t = 2, -1, 0: the student likes token 0 too much, so its advantage falls by 0.5 * 2; token 2's rises.
    assert term(OpdConfig(type=OpdType.megatron)) == [0.0, 0.0, 1.5, -1.0]


def test_weights_scale_the_term_only() -> None:
    # Token 2 is unknown to the teacher: its NaN is never read; the others count 1.5 times.
    teacher = torch.tensor([-3.0, NAN, NAN, -0.5])
    tokens = batch([1.5, 0.0, 0.0, 1.5])
    found = subtract_opd_term(ADVANTAGE, STUDENT, teacher, tokens, opd=OpdConfig(), kl_coef=0.5)
    assert found.tolist() == [-0.5, 0.0, 1.0, -1.0]


def test_clip_golden() -> None:
    # 2 -> 1.5, -1 stays.
    assert term(OpdConfig(clip=1.5)) == [0.25, 0.0, 1.5, -1.0]


def test_trust_region_golden() -> None:
    # alpha 0.5: -log(0.5 exp(t - s) + 0.5). Token 0: -log(0.5 e^-2 + 0.5) = 0.5662192; token 2: -log(0.5 e + 0.5) =
    # -0.6201145; token 3: 0.
    found = term(OpdConfig(trust_alpha=0.5), kl_coef=1.0)
    torch.testing.assert_close(torch.tensor(found), torch.tensor([1 - 0.5662192, 0.0, 1.6201145, -1.0]))


def test_first_fraction_golden() -> None:
    # Of 3 unmasked tokens ceil(0.5 * 3) = 2 keep the term.
    student, teacher = torch.tensor([-1.0, NAN, -2.0, -0.5]), torch.tensor([-3.0, NAN, -1.0, -4.5])
    opd = OpdConfig(weights=WeightsConfig(kind=TokenWeights.first_fraction, fraction=0.5))
    found = subtract_opd_term(ADVANTAGE, student, teacher, batch([1.0, 0.0, 1.0, 1.0]), opd=opd, kl_coef=0.5)
    assert found.tolist() == [0.0, 0.0, 1.5, -1.0]


def test_importance_golden() -> None:
    # |s - t| = 2, 1, 1 of 4: weights 1 + (1 - 0) = 2, 1 + (1 - 0.5) = 1.5, 1 + (1 - 0.75) = 1.25.
    student, teacher = torch.tensor([-1.0, NAN, -2.0, -0.5]), torch.tensor([-3.0, NAN, -1.0, -1.5])
    opd = OpdConfig(weights=WeightsConfig(kind=TokenWeights.importance))
    found = subtract_opd_term(torch.zeros(4), student, teacher, batch([1.0, 0.0, 1.0, 1.0]), opd=opd, kl_coef=1.0)
    assert found.tolist() == [-4.0, 0.0, 1.5, -1.25]


@pytest.mark.parametrize("unknown", [NAN, -math.inf])
def test_an_unknown_teacher_is_never_taken_for_zero(unknown: float) -> None:
    teacher = torch.tensor([-3.0, NAN, unknown, -0.5])
    with pytest.raises(TeacherError, match="for 1 of 3 tokens"):
        subtract_opd_term(ADVANTAGE, STUDENT, teacher, batch([1.0, 0.0, 1.0, 1.0]), opd=OpdConfig(), kl_coef=0.5)


def test_no_gradient_flows_through_the_term() -> None:
    student = STUDENT.clone().requires_grad_()
    tokens = batch([1.0, 0.0, 1.0, 1.0])
    found = subtract_opd_term(ADVANTAGE, student, TEACHER, tokens, opd=OpdConfig(), kl_coef=0.5)
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("valid", "expected"),
    [
        ([True, True, True, False], [1.0, 1.0, 1.0, 0.0]),
        # Weights 0.5, 0.25, 0.25: without the first token the others stand for 1 / 0.5.
        ([False, True, True, False], [0.0, 2.0, 2.0, 0.0]),
        ([False, False, False, False], [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_the_term_is_a_mean_over_valid_tokens(valid: list[bool], expected: list[float]) -> None:
    weight: Tensor = torch.tensor([0.5, 0.25, 0.25, 0.0])
    assert opd_weights(weight, torch.tensor(valid)).tolist() == expected
