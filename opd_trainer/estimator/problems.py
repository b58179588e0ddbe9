"""Settings of an estimator that are known to be zero or wrong, found before anything starts."""

from opd_trainer.errors import Problem
from opd_trainer.estimator.base import Estimator
from opd_trainer.estimator.none import NoEstimator
from opd_trainer.loss.aggregation import Aggregation
from opd_trainer.loss.config import KlApply, ReferenceConfig


def estimator_problems(estimator: Estimator, reference: ReferenceConfig) -> list[Problem]:
    """What is wrong with the estimator, and with a reference beside it."""
    found = []
    if isinstance(estimator, NoEstimator) and reference.used and reference.apply is KlApply.reward:
        found.append(
            Problem(
                "reference.apply",
                "reward with estimator=none",
                "rewards are not used, so the KL to the reference would have no effect",
                "Set reference.apply=loss",
            )
        )
    tokens = estimator.aggregation_tokens
    if tokens is not None and (tokens < 1 or estimator.aggregation is not Aggregation.constant):
        found.append(
            Problem(
                "estimator.aggregation_tokens",
                f"{tokens} with aggregation={estimator.aggregation}",
                "it is the positive length that the constant aggregation divides by",
                "Set estimator.aggregation=constant, or estimator.aggregation_tokens=null",
            )
        )
    for key in ("gamma", "lam"):
        value = getattr(estimator, key, 1.0)
        if not 0 <= value <= 1:
            found.append(
                Problem(f"estimator.{key}", f"{value}", "a discount lies between 0 and 1", f"Set estimator.{key}=1")
            )
    critic_loss = estimator.critic_loss
    if critic_loss is not None and critic_loss.clip <= 0:
        found.append(
            Problem(
                "estimator.value_loss.clip",
                f"{critic_loss.clip}",
                "the critic could never move its values",
                "Set estimator.value_loss.clip=0.2",
            )
        )
    return found
