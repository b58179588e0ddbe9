"""Settings of the loss that are known to be zero or wrong, found before anything starts."""

from opd_trainer.errors import Problem
from opd_trainer.loss.cispo import CispoLoss
from opd_trainer.loss.clip import ClipLoss
from opd_trainer.loss.config import Correction, KlApply, KlEstimator, LossConfig, ReferenceConfig
from opd_trainer.loss.gspo import GspoLoss
from opd_trainer.loss.policy import PolicyLoss
from opd_trainer.loss.sapo import SapoLoss


def reference_problems(reference: ReferenceConfig) -> list[Problem]:
    """What is wrong with the KL to the reference."""
    found = []
    if reference.used and reference.apply is KlApply.reward and reference.chosen_estimator is not KlEstimator.k1:
        found.append(
            Problem(
                "reference.estimator",
                f"{reference.chosen_estimator} as a reward",
                "as a detached penalty only k1 has the gradient of the reverse KL; k2 and k3 point elsewhere",
                "Set reference.estimator=k1, or reference.apply=loss",
            )
        )
    return found


def loss_problems(options: LossConfig) -> list[Problem]:
    """What is wrong with the other settings of the loss."""
    found = []
    low, high = options.correction_low, options.correction_high
    if options.correction is not Correction.none and not 0 <= low < high:
        found.append(
            Problem(
                "loss.correction_low",
                f"band [{low}, {high}]",
                "ratios are positive and a band needs its lower end below its upper end",
                "Set loss.correction_low=0 loss.correction_high=2",
            )
        )
    for key in ("updates_per_rollout", "epochs_per_rollout"):
        if getattr(options, key) < 1:
            found.append(
                Problem(
                    f"loss.{key}", f"{getattr(options, key)}", "a rollout must be learned from", f"Set loss.{key}=1"
                )
            )
    return found


def policy_loss_problems(loss: PolicyLoss) -> list[Problem]:
    """What is wrong with the hyper-parameters of a policy loss."""
    found = []
    if isinstance(loss, ClipLoss | GspoLoss | CispoLoss):
        if not 0 <= loss.eps_low <= 1:
            found.append(_range("eps_low", loss.eps_low, "1 - eps_low is the smallest ratio, which is never negative"))
        if loss.eps_high < 0:
            found.append(_range("eps_high", loss.eps_high, "1 + eps_high must not lie below 1"))
    if isinstance(loss, ClipLoss) and loss.dual_clip is not None and loss.dual_clip <= 1:
        found.append(_range("dual_clip", loss.dual_clip, "a bound of at most 1 would cut the loss at ratio 1", "3"))
    if isinstance(loss, SapoLoss):
        for key in ("tau_pos", "tau_neg"):
            if getattr(loss, key) <= 0:
                found.append(_range(key, getattr(loss, key), "the gate needs a positive steepness", "1"))
    return found


def _range(key: str, value: float, why: str, good: str = "0.2") -> Problem:
    return Problem(f"estimator.loss.{key}", f"{value}", why, f"Set estimator.loss.{key}={good}")
