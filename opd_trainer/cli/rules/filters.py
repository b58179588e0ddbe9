"""Filters of samples that would leave nothing, or take what is learned from."""

from collections.abc import Iterator

from opd_trainer.cli.named import Named
from opd_trainer.cli.rules.algorithms import rewardless
from opd_trainer.cli.rules.common import Rule
from opd_trainer.config import Config
from opd_trainer.errors import Problem
from opd_trainer.reward.config import NoReward
from opd_trainer.rollout.config import ZeroStd


def contrast_matters(config: Config, named: Named) -> Iterator[Problem]:
    """Leaving out groups by their rewards makes sense where the rewards are learned from."""
    if config.rollout.filter.zero_std is ZeroStd.keep:
        return
    cause = rewardless(config)
    if cause is not None and config.opd.on:
        yield Problem(
            "rollout.filter.zero_std",
            f"{config.rollout.filter.zero_std} with {cause}",
            "the task reward does not reach the student, while the teacher has something to say about every group: "
            "what it says about the groups left out would be lost",
            "Set rollout.filter.zero_std=keep, or estimator=grpo opd.only_reward=false",
        )


def contrast_is_possible(config: Config, named: Named) -> Iterator[Problem]:
    """With one sample per prompt, or one reward for all, every group would be left out."""
    filters, rollout = config.rollout.filter, config.rollout
    if filters.zero_std is ZeroStd.keep:
        return
    if rollout.samples_per_prompt == 1:
        yield Problem(
            "rollout.filter.zero_std",
            f"{filters.zero_std} with rollout.samples_per_prompt=1",
            "the rewards of a group of one are all the same: every group would be left out",
            "Set rollout.samples_per_prompt=4, or rollout.filter.zero_std=keep",
        )
    if filters.zero_std is ZeroStd.replace and filters.max_rounds == 1:
        yield Problem(
            "rollout.filter.max_rounds",
            "1 with rollout.filter.zero_std=replace",
            "the first round of generation is one of them, so that nothing would be replaced",
            "Set rollout.filter.max_rounds=4, or rollout.filter.zero_std=drop",
        )
    if isinstance(config.reward, NoReward) or config.reward.scale == 0:
        yield Problem(
            "rollout.filter.zero_std",
            f"{filters.zero_std} with a reward that is the same for every sample",
            "every group would be left out",
            "Set rollout.filter.zero_std=keep, or choose a reward",
        )


TRAINING: tuple[Rule, ...] = (contrast_matters, contrast_is_possible)
