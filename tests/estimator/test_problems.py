import pytest

from opd_trainer.estimator.base import Estimator
from opd_trainer.estimator.grpo import Grpo
from opd_trainer.estimator.none import NoEstimator
from opd_trainer.estimator.ppo import Ppo
from opd_trainer.estimator.problems import estimator_problems
from opd_trainer.loss.aggregation import Aggregation
from opd_trainer.loss.config import KlApply, ReferenceConfig
from opd_trainer.loss.value import ValueLoss
from tests.laws.options import ESTIMATORS


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_defaults_have_no_problem(estimator: Estimator) -> None:
    assert estimator_problems(estimator, ReferenceConfig(kl_coef=0.1)) == []


@pytest.mark.parametrize(
    ("estimator", "reference", "key"),
    [
        (NoEstimator(), ReferenceConfig(kl_coef=0.1, apply=KlApply.reward), "reference.apply"),
        (Grpo(aggregation_tokens=8), ReferenceConfig(), "estimator.aggregation_tokens"),
        (
            Grpo(aggregation=Aggregation.constant, aggregation_tokens=0),
            ReferenceConfig(),
            "estimator.aggregation_tokens",
        ),
        (Ppo(gamma=1.5), ReferenceConfig(), "estimator.gamma"),
        (Ppo(lam=-0.5), ReferenceConfig(), "estimator.lam"),
        (Ppo(value_loss=ValueLoss(clip=0.0)), ReferenceConfig(), "estimator.value_loss.clip"),
    ],
)
def test_problems_are_told_with_their_key(estimator: Estimator, reference: ReferenceConfig, key: str) -> None:
    [problem] = estimator_problems(estimator, reference)
    assert problem.key == key
    assert problem.fix.startswith("Set ")
