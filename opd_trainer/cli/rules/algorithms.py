"""Combinations that are known to learn nothing or the wrong thing."""

from collections.abc import Iterator

from opd_trainer.cli.named import Named
from opd_trainer.cli.rules.common import Rule
from opd_trainer.config import Config
from opd_trainer.errors import Problem
from opd_trainer.estimator.none import NoEstimator
from opd_trainer.estimator.problems import estimator_problems
from opd_trainer.loss.config import KlApply, KlEstimator
from opd_trainer.loss.problems import loss_problems, policy_loss_problems, reference_problems
from opd_trainer.opd.config import OpdConfig, OpdType, ScheduleKind
from opd_trainer.opd.problems import opd_problems
from opd_trainer.reward.config import NoReward


def algorithm(config: Config, named: Named) -> Iterator[Problem]:
    """What the algorithms themselves know to be zero or wrong."""
    estimator, opd = config.estimator, config.opd
    yield from opd_problems(opd, estimator_whitens=estimator.whiten, estimator_has_returns=estimator.has_returns)
    yield from estimator_problems(estimator, config.reference)
    yield from policy_loss_problems(estimator.loss)
    yield from reference_problems(config.reference)
    yield from loss_problems(config.loss)


def server_temperature(config: Config, named: Named) -> Iterator[Problem]:
    """SGLang gives log-probs of temperature 1, whatever the student samples at."""
    if config.opd.type is OpdType.sglang and config.rollout.temperature != 1.0:
        yield Problem(
            "rollout.temperature",
            f"{config.rollout.temperature} with opd=sglang",
            "the server gives log-probs of temperature 1: the difference to the student's would mean nothing",
            "Set rollout.temperature=1.0, or opd=megatron, where both sides are computed at the same temperature",
        )


def group_needs_siblings(config: Config, named: Named) -> Iterator[Problem]:
    """A group estimator with one sample per prompt has advantage 0; without OPD nothing is learned."""
    alone = "group" in config.estimator.needs and config.rollout.samples_per_prompt == 1
    untaught = "opd=off" if config.opd.type is OpdType.off else "opd.kl_coef=0" if silent(config.opd) else None
    if alone and untaught is not None:
        yield Problem(
            "rollout.samples_per_prompt",
            f"1 with a group-relative estimator and {untaught}",
            "the advantage of a response relative to itself is 0, so nothing would be learned",
            "Set rollout.samples_per_prompt=4, estimator=reinforce_plus_plus, or "
            + ("opd=megatron" if untaught == "opd=off" else "opd.kl_coef=1"),
        )


def rollout_is_divisible(config: Config, named: Named) -> Iterator[Problem]:
    """More minibatches than samples; a run made tiny (`debug`) takes as many as it has samples."""
    if "debug" in named:
        return
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    if 0 < samples < config.loss.updates_per_rollout:
        yield Problem(
            "loss.updates_per_rollout",
            f"{config.loss.updates_per_rollout} with {samples} samples in a step",
            "each update learns from samples of its own",
            f"Set loss.updates_per_rollout={samples} or less, or loss.epochs_per_rollout for several passes over them",
        )


def rewardless(config: Config) -> str | None:
    """What keeps the task reward from the student, as the user would type it; None where it arrives."""
    if config.opd.only_reward:
        return "opd.only_reward=true"
    return "estimator=none" if isinstance(config.estimator, NoEstimator) else None


def silent(opd: OpdConfig) -> bool:
    """Whether the teacher is there, but never says anything: its coefficient is 0 in every step."""
    moves = opd.schedule.kind is not ScheduleKind.constant and opd.schedule.final != 0
    return opd.on and opd.kl_coef == 0 and not moves


def unused_critic(config: Config, named: Named) -> Iterator[Problem]:
    """A critic is configured, but the estimator needs no values."""
    if config.estimator.critic_loss is None and "critic" in named:
        yield Problem(
            "critic",
            "set with an estimator that needs no values",
            "there would be no critic",
            "Set estimator=ppo, or drop critic.*",
        )


def someone_teaches(config: Config, named: Named) -> Iterator[Problem]:
    """Neither a task reward nor a teacher reaches the student."""
    causes = {
        "opd.only_reward=true": (config.opd.only_reward, "opd.only_reward=false"),
        "estimator=none": (isinstance(config.estimator, NoEstimator), "estimator=grpo"),
        "reward=none": (isinstance(config.reward, NoReward), "reward=exact"),
        "reward.scale=0": (config.reward.scale == 0, "reward.scale=1"),
    }
    found = [cause for cause, (is_so, _) in causes.items() if is_so]
    if not found:
        return
    rewarded = " ".join(fix for is_so, fix in causes.values() if is_so)
    if config.opd.type is OpdType.off:
        yield Problem(
            found[0].partition("=")[0],
            f"{' and '.join(found)} with opd=off",
            "without a task reward and without a teacher nothing would be learned",
            f"Set opd=megatron with teacher.load=DIR, or {rewarded}",
        )
    elif silent(config.opd):
        yield Problem(
            "opd.kl_coef",
            f"0 with {' and '.join(found)}",
            "neither the task reward nor the teacher would reach the student",
            f"Set opd.kl_coef=1.0, or {rewarded}",
        )


def zero_gradient_penalty(config: Config, named: Named) -> Iterator[Problem]:
    """k1 as a loss has gradient zero in expectation."""
    reference = config.reference
    k1 = reference.chosen_estimator is KlEstimator.k1
    if reference.used and k1 and reference.apply is KlApply.loss:
        yield Problem(
            "reference.estimator",
            "k1 with reference.apply=loss",
            "the expected gradient of log p_student under the student is zero: the penalty would do nothing",
            "Set reference.estimator=k2 (reverse KL), or reference.apply=reward",
        )


def temperature_is_positive(config: Config, named: Named) -> Iterator[Problem]:
    """Log-probs are those of logits / temperature."""
    if config.rollout.temperature <= 0:
        yield Problem(
            "rollout.temperature",
            str(config.rollout.temperature),
            "training divides logits by it, and greedy responses teach nothing about probabilities",
            "Set rollout.temperature=1.0 (eval.temperature=0 is greedy evaluation)",
        )


TRAINING: tuple[Rule, ...] = (
    algorithm,
    server_temperature,
    group_needs_siblings,
    rollout_is_divisible,
    unused_critic,
    someone_teaches,
    zero_gradient_penalty,
    temperature_is_positive,
)
