"""Settings of an estimator that are known to be zero or wrong, found before anything starts."""

from opd_trainer.errors import Problem
from opd_trainer.estimator.base import Estimator
from opd_trainer.estimator.none import NoEstimator
from opd_trainer.loss.aggregation import Aggregation
from opd_trainer.loss.config import KlApply, ReferenceConfig


def estimator_problems(
    estimator: Estimator, reference: ReferenceConfig, *, samples_per_prompt: int, opd_on: bool
) -> list[Problem]:
    """What is wrong with the estimator in its surroundings."""
    found = []
    if "group" in estimator.needs and samples_per_prompt < 2 and not opd_on:
        found.append(
            Problem(
                "rollout.samples_per_prompt",
                f"{samples_per_prompt} with a group estimator and OPD off",
                "a response without siblings has advantage 0, so nothing would be learned",
                "Set rollout.samples_per_prompt=4, or estimator=reinforce_plus_plus.",
            )
        )
    if isinstance(estimator, NoEstimator) and not opd_on:
        found.append(
            Problem(
                "estimator",
                "none with opd=off",
                "without an advantage and without a teacher nothing would be learned",
                "Set estimator=grpo, or opd=megatron teacher.load=PATH.",
            )
        )
    if isinstance(estimator, NoEstimator) and reference.used and reference.apply is KlApply.reward:
        found.append(
            Problem(
                "reference.apply",
                "reward with estimator=none",
                "rewards are not used, so the KL to the reference would have no effect",
                "Set reference.apply=loss.",
            )
        )
    tokens = estimator.aggregation_tokens
    if tokens is not None and (tokens < 1 or estimator.aggregation is not Aggregation.constant):
        found.append(
            Problem(
                "estimator.aggregation_tokens",
                f"{tokens} with aggregation={estimator.aggregation}",
                "it is the positive length that the constant aggregation divides by",
                "Set estimator.aggregation=constant, or estimator.aggregation_tokens=null.",
            )
        )
    for key in ("gamma", "lam"):
        value = getattr(estimator, key, 1.0)
        if not 0 <= value <= 1:
            found.append(
                Problem(f"estimator.{key}", f"{value}", "a discount lies between 0 and 1", f"Set estimator.{key}=1.")
            )
    return found
