"""Whether the task reward can tell what is asked of it: which responses are right, and which part of it says so."""

from collections.abc import Iterator

from opd_trainer.cli.named import Named
from opd_trainer.cli.rules.common import Rule, files
from opd_trainer.config import Config
from opd_trainer.data.config import DataConfig
from opd_trainer.errors import Problem
from opd_trainer.eval.problems import eval_problems
from opd_trainer.reward.config import (
    CompositeReward,
    CustomReward,
    ExactReward,
    FormatReward,
    Gsm8kReward,
    MathReward,
    NoReward,
    RemoteReward,
    RewardConfig,
)
from opd_trainer.task.config import SftTask, TrainTask

VERDICTS = (ExactReward, Gsm8kReward, MathReward, FormatReward)
"""Rewards whose value is 0 or 1, before scale and offset."""
COMPARING = (ExactReward, Gsm8kReward, MathReward)
"""Rewards that need a label."""
OPEN = (CustomReward, RemoteReward)
"""Rewards whose parts are known only once they answer."""


def evaluation_can_work(config: Config, named: Named) -> Iterator[Problem]:
    """What the evaluation itself knows to be wrong."""
    if config.eval.datasets:
        yield from eval_problems(config.eval)


def right_is_told_from_wrong(config: Config, named: Named) -> Iterator[Problem]:
    """The two values of a verdict lie on both sides of what counts as correct."""
    reward, key = _verdict(config)
    if not config.eval.datasets or not isinstance(reward, VERDICTS):
        return
    wrong, right, above = reward.offset, reward.scale + reward.offset, config.eval.correct_above
    if wrong <= above < right:
        return
    if right <= wrong:
        why = "a right response is worth no more than a wrong one, so that no evaluation could tell them apart"
        fix = f"Set {key}.scale=1; opd.only_reward=true keeps the task reward from the student"
        yield Problem(f"{key}.scale", f"{reward.scale:g}", why, fix)
    else:
        why = f"every held-out response would count as {'correct' if wrong > above else 'wrong'}"
        what = f"{above:g} with a reward of {wrong:g} for wrong and {right:g} for right responses"
        yield Problem("eval.correct_above", what, why, f"Set eval.correct_above={(wrong + right) / 2:g}")


def parts_are_there(config: Config, named: Named) -> Iterator[Problem]:
    """A part of the reward is named that it does not have."""
    names, is_open = _parts(config.reward)
    asked = (("eval.correct_part", config.eval.correct_part), ("rollout.filter.part", config.rollout.filter.part))
    for key, part in asked:
        if part is None or part in {"reward", *names} or is_open:
            continue
        what = f"{part!r} with a reward that has no such part"
        why = f"its parts are {', '.join(names)}" if names else "only a composite reward, or one of yours, has parts"
        yield Problem(key, what, why, f"Set {key}={names[0]}, or null for the whole reward" if names else f"Drop {key}")


def labels_are_there(config: Config, named: Named) -> Iterator[Problem]:
    """A reward compares with labels that the data are said not to have."""
    comparing = [key for key, reward in _with_parts("reward", config.reward) if isinstance(reward, COMPARING)]
    datasets: list[tuple[str, DataConfig]] = [(f"eval.datasets.{name}", d) for name, d in config.eval.datasets.items()]
    if isinstance(config.task, TrainTask):
        datasets.insert(0, ("data", config.data))
    for whole, dataset in datasets if comparing else ():
        for at, data in files(whole, dataset):
            if data.label_key is None:
                fix = f"Set {at}.label_key to the column that holds the answer, or reward=none"
                yield Problem(f"{at}.label_key", "null", f"{comparing[0]} compares every response with a label", fix)


def accuracy_is_measured(config: Config, named: Named) -> Iterator[Problem]:
    """A supervised run waits for an accuracy that nobody measures."""
    if not isinstance(config.task, SftTask):
        return
    causes = {
        "reward=none": (isinstance(config.reward, NoReward), "reward=exact"),
        "eval.datasets={}": (not config.eval.datasets, "eval.datasets.NAME.path=FILE"),
        "eval.every=0": (config.eval.every == 0, "eval.every=50"),
    }
    found = [cause for cause, (is_so, _) in causes.items() if is_so]
    fixes = " ".join(fix for is_so, fix in causes.values() if is_so)
    for name in ("stop_accuracy", "snapshot_accuracy"):
        wanted = getattr(config.task, name)
        if wanted is not None and found:
            why = "no held-out answer is graded before the run ends, so that it would never be reached"
            what = f"{wanted:g} with {' and '.join(found)}"
            yield Problem(f"task.{name}", what, why, f"Set {fixes}, or task.{name}=null")


def _with_parts(key: str, reward: RewardConfig) -> Iterator[tuple[str, RewardConfig]]:
    yield key, reward
    if isinstance(reward, CompositeReward):
        for name, part in reward.parts.items():
            yield from _with_parts(f"{key}.parts.{name}", part)


def _verdict(config: Config) -> tuple[RewardConfig | None, str]:
    """The reward that says whether a response is correct, and its key."""
    part, reward = config.eval.correct_part, config.reward
    if part is None or part == "reward":
        return reward, "reward"
    if isinstance(reward, CompositeReward):
        return reward.parts.get(part), f"reward.parts.{part}"
    return None, "reward"


def _parts(reward: RewardConfig) -> tuple[list[str], bool]:
    """Names of the parts, and whether there may be others."""
    if not isinstance(reward, CompositeReward):
        return [], isinstance(reward, OPEN)
    names, is_open = [], False
    for name, part in reward.parts.items():
        inner, inner_is_open = _parts(part)
        names += [name, *(f"{name}/{of_part}" for of_part in inner)]
        is_open = is_open or inner_is_open
    return names, is_open


ALWAYS: tuple[Rule, ...] = (
    evaluation_can_work,
    right_is_told_from_wrong,
    parts_are_there,
    labels_are_there,
    accuracy_is_measured,
)
