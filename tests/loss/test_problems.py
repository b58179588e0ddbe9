import pytest

from opd_trainer.loss.cispo import CispoLoss
from opd_trainer.loss.clip import ClipLoss
from opd_trainer.loss.config import Correction, KlApply, KlEstimator, LossConfig, ReferenceConfig
from opd_trainer.loss.policy import PolicyLoss
from opd_trainer.loss.problems import loss_problems, policy_loss_problems, reference_problems
from opd_trainer.loss.sapo import SapoLoss
from tests.laws.options import POLICY_LOSSES


@pytest.mark.parametrize("loss", POLICY_LOSSES.values(), ids=POLICY_LOSSES)
def test_defaults_have_no_problem(loss: PolicyLoss) -> None:
    assert policy_loss_problems(loss) == []
    assert loss_problems(LossConfig()) == []
    assert reference_problems(ReferenceConfig(kl_coef=0.1)) == []
    assert reference_problems(ReferenceConfig(kl_coef=0.1, apply=KlApply.reward)) == []


@pytest.mark.parametrize("estimator", [KlEstimator.k2, KlEstimator.k3])
def test_only_k1_is_a_reward(estimator: KlEstimator) -> None:
    [problem] = reference_problems(ReferenceConfig(kl_coef=0.1, apply=KlApply.reward, estimator=estimator))
    assert problem.key == "reference.estimator"
    assert problem.fix == "Set reference.estimator=k1, or reference.apply=loss"


@pytest.mark.parametrize(
    ("loss", "key"),
    [
        (ClipLoss(eps_low=1.5), "eps_low"),
        (ClipLoss(eps_high=-0.1), "eps_high"),
        (ClipLoss(dual_clip=1.0), "dual_clip"),
        (CispoLoss(eps_low=-1.0), "eps_low"),
        (SapoLoss(tau_neg=0.0), "tau_neg"),
    ],
)
def test_ranges_of_policy_losses(loss: PolicyLoss, key: str) -> None:
    [problem] = policy_loss_problems(loss)
    assert problem.key == f"estimator.loss.{key}"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (LossConfig(correction=Correction.tis, correction_low=3.0), "loss.correction_low"),
        (LossConfig(updates_per_rollout=0), "loss.updates_per_rollout"),
        (LossConfig(epochs_per_rollout=0), "loss.epochs_per_rollout"),
    ],
)
def test_ranges_of_the_loss(options: LossConfig, key: str) -> None:
    [problem] = loss_problems(options)
    assert problem.key == key
