import pytest

from opd_trainer.opd.config import (
    OpdApply,
    OpdConfig,
    OpdType,
    ScheduleConfig,
    ScheduleKind,
    TokenWeights,
    WeightsConfig,
)
from opd_trainer.opd.problems import opd_problems

ON = OpdType.megatron


@pytest.mark.parametrize("opd", [OpdConfig(type=OpdType.off), OpdConfig(type=ON)])
def test_defaults_have_no_problem(opd: OpdConfig) -> None:
    assert opd_problems(opd, estimator_whitens=True, estimator_has_returns=True) == []
    assert opd_problems(opd, estimator_whitens=False, estimator_has_returns=False) == []


@pytest.mark.parametrize(
    ("opd", "whitens", "has_returns", "key"),
    [
        (OpdConfig(type=ON, apply=OpdApply.before_normalization), False, False, "opd.apply"),
        (OpdConfig(type=ON, in_returns=True), False, False, "opd.in_returns"),
        (OpdConfig(type=ON, in_returns=True), True, True, "opd.in_returns"),
        (OpdConfig(type=ON, clip=0.0), True, True, "opd.clip"),
        (OpdConfig(type=ON, trust_alpha=0.0), True, True, "opd.trust_alpha"),
        (OpdConfig(type=ON, trust_alpha=1.5), True, True, "opd.trust_alpha"),
        (OpdConfig(type=ON, log_prob_top_k=-1), True, True, "opd.log_prob_top_k"),
        (
            OpdConfig(type=ON, weights=WeightsConfig(kind=TokenWeights.first_fraction, fraction=0.0)),
            True,
            True,
            "opd.weights.fraction",
        ),
        (
            OpdConfig(type=ON, weights=WeightsConfig(kind=TokenWeights.importance, gamma=-1.0)),
            True,
            True,
            "opd.weights.gamma",
        ),
        (
            OpdConfig(type=ON, kl_coef=0.0, schedule=ScheduleConfig(kind=ScheduleKind.target_kl)),
            True,
            True,
            "opd.schedule.kind",
        ),
        (
            OpdConfig(type=ON, schedule=ScheduleConfig(kind=ScheduleKind.linear, final=-1.0)),
            True,
            True,
            "opd.schedule",
        ),
    ],
)
def test_problems_are_told_with_their_key(opd: OpdConfig, whitens: bool, has_returns: bool, key: str) -> None:
    [problem] = opd_problems(opd, estimator_whitens=whitens, estimator_has_returns=has_returns)
    assert problem.key == key
    assert problem.fix.startswith("Set ")


def test_asking_for_whitening_after_the_term_is_allowed() -> None:
    opd = OpdConfig(type=ON, in_returns=True, apply=OpdApply.before_normalization)
    assert opd_problems(opd, estimator_whitens=True, estimator_has_returns=True) == []
