"""Rollouts of older weights."""

from collections.abc import Iterator

from opd_trainer.cli.named import Named
from opd_trainer.cli.rules.common import Rule
from opd_trainer.config import Config
from opd_trainer.errors import Problem
from opd_trainer.loss.config import Correction
from opd_trainer.opd.config import StudentLogProb
from opd_trainer.rollout.config import RolloutMode


def term_is_about_the_student(config: Config, named: Named) -> Iterator[Problem]:
    """One step off, the engine's log-probs are those of an earlier student."""
    late = config.rollout.mode is RolloutMode.one_step_off
    if late and config.opd.on and config.opd.student_log_prob is StudentLogProb.rollout:
        yield Problem(
            "opd.student_log_prob",
            "rollout with rollout.mode=one_step_off",
            "the engine's weights are one version old: the term would compare the teacher with a student of the past",
            "Set opd.student_log_prob=live, or rollout.mode=sync",
        )


def corrects(config: Config) -> bool:
    """Whether the mismatch of engine and trainer is corrected."""
    asked = config.loss.correction
    return config.rollout.mode is RolloutMode.one_step_off if asked is None else asked is not Correction.none


def correction_corrects(config: Config, named: Named) -> Iterator[Problem]:
    """A band of ratios that leaves out 1 changes or removes what is on-policy."""
    low, high = config.loss.correction_low, config.loss.correction_high
    if corrects(config) and 0 <= low < high and not low <= 1 <= high:
        yield Problem(
            "loss.correction_high" if high < 1 else "loss.correction_low",
            f"band [{low:g}, {high:g}]",
            "tokens on which engine and trainer agree have ratio 1, which must lie inside",
            "Set loss.correction_low=0 loss.correction_high=2",
        )


def something_to_overlap(config: Config, named: Named) -> Iterator[Problem]:
    """The only step of a run has no step before it."""
    if config.rollout.mode is RolloutMode.one_step_off and config.steps == 1:
        yield Problem(
            "rollout.mode",
            "one_step_off with steps=1",
            "the samples of a step are generated during the step before it",
            "Set rollout.mode=sync, or more steps",
        )


TRAINING: tuple[Rule, ...] = (term_is_about_the_student, correction_corrects, something_to_overlap)
