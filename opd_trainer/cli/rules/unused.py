"""Settings that nothing would look at: they belong to a choice that was not made."""

from collections.abc import Iterator
from dataclasses import dataclass

from opd_trainer.cli.named import Named
from opd_trainer.cli.rules.common import Rule
from opd_trainer.cli.rules.rollouts import corrects
from opd_trainer.config import Config
from opd_trainer.divergence.config import DivergenceKind
from opd_trainer.errors import Problem
from opd_trainer.megatron.config import Schedule
from opd_trainer.opd.config import ScheduleKind, TokenWeights
from opd_trainer.rollout.config import ZeroStd

TOP_K = (
    DivergenceKind.topk_reverse_kl,
    DivergenceKind.topk_forward_kl,
    DivergenceKind.student_topk_sampled_tail,
)


@dataclass(frozen=True, slots=True)
class Dependent:
    """Settings that mean something only beside another one.

    Attributes:
        keys: of the settings.
        used: whether they mean something here.
        because: what was chosen instead.
        choose: the override that would give them their meaning.
        excused: keys of which one, when it was named, allows them all the same: a sweep goes over these, and says the
            rest for all of its jobs.
    """

    keys: tuple[str, ...]
    used: bool
    because: str
    choose: str
    excused: tuple[str, ...] = ()


def dependents(config: Config) -> Iterator[Dependent]:
    """Every group of such settings."""
    schedule, weights, divergence = config.opd.schedule.kind, config.opd.weights.kind, config.opd.divergence.kind
    kept = config.rollout.filter.zero_std
    yield Dependent(
        ("opd.schedule.final", "opd.schedule.steps"),
        schedule in (ScheduleKind.linear, ScheduleKind.cosine),
        f"opd.schedule.kind={schedule}",
        "opd.schedule.kind=linear",
    )
    yield Dependent(
        ("opd.schedule.target", "opd.schedule.horizon"),
        schedule is ScheduleKind.target_kl,
        f"opd.schedule.kind={schedule}",
        "opd.schedule.kind=target_kl",
    )
    for key, kind in (("fraction", TokenWeights.first_fraction), ("gamma", TokenWeights.importance)):
        because = f"opd.weights.kind={weights}"
        yield Dependent((f"opd.weights.{key}",), weights is kind, because, f"opd.weights.kind={kind}")
    for key, kinds in (("beta", (DivergenceKind.jsd,)), ("top_k", TOP_K)):
        yield Dependent(
            (f"opd.divergence.{key}",),
            divergence in kinds,
            f"opd.divergence.kind={divergence}",
            f"opd.divergence.kind={kinds[0]}",
            excused=("opd.divergence.kind",),
        )
    yield Dependent(
        ("loss.correction_low", "loss.correction_high"),
        corrects(config),
        "no correction of the mismatch between engine and trainer",
        "loss.correction=tis",
        excused=("loss.correction", "rollout.mode"),
    )
    yield Dependent(
        tuple(f"reference.{name}" for name in ("load", "ckpt_step", "apply", "estimator", "placement")),
        config.reference.used,
        "reference.kl_coef=0",
        "reference.kl_coef=0.01",
        excused=("reference.kl_coef",),
    )
    because, replaced = f"rollout.filter.zero_std={kept}", "rollout.filter.zero_std=replace"
    yield Dependent(("rollout.filter.max_rounds",), kept is ZeroStd.replace, because, replaced)
    yield Dependent(("rollout.filter.part",), kept is not ZeroStd.keep, because, replaced)
    for owner, optimizer in (("megatron", config.megatron.optimizer), ("critic", config.critic.optimizer)):
        yield Dependent(
            (f"{owner}.optimizer.min_lr", f"{owner}.optimizer.decay_steps"),
            optimizer.schedule is not Schedule.constant,
            f"{owner}.optimizer.schedule=constant",
            f"{owner}.optimizer.schedule=cosine",
            excused=(f"{owner}.optimizer.schedule",),
        )


def settings_are_looked_at(config: Config, named: Named) -> Iterator[Problem]:
    """A setting was named, but not the choice that it belongs to."""
    for one in dependents(config):
        if one.used or any(key in named for key in one.excused):
            continue
        for key in one.keys:
            if key in named:
                why = "nothing would look at it"
                yield Problem(key, f"set with {one.because}", why, f"Set {one.choose}, or drop {key}")


TRAINING: tuple[Rule, ...] = (settings_are_looked_at,)
