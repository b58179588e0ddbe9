"""From the jobs of a multirun to a sweep: its directory, which the same command finds again, and its trials."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override

from opd_trainer.cli.check import Checked, is_hydras, without_nulls
from opd_trainer.cli.composition import Composer
from opd_trainer.cli.resume import unmakable
from opd_trainer.config import Config
from opd_trainer.errors import Problem
from opd_trainer.run_record import config_hash
from opd_trainer.sweep.record import SWEEP_FILE, Sweep, Trial, joined, plain_name, trial_name

SWEEPER = "trials"


def jobs_of(parsed: Sequence[Override]) -> list[list[str]]:
    """The overrides of every job of a multirun, as our sweeper splits them."""
    listed = [override for override in parsed if not override.is_sweep_override() or override.is_discrete_sweep()]
    return BasicSweeper.split_arguments(listed, max_batch_size=None)[0]


def sweep_problems(parsed: Sequence[Override]) -> Iterator[Problem]:
    """What a multirun of ours cannot do."""
    for override in parsed:
        key = override.key_or_group
        if override.is_sweep_override() and not override.is_discrete_sweep():
            yield Problem(
                key,
                f"an interval, {override.input_line}",
                "the trials of a sweep are listed before the first one starts",
                f"List values: {key}=A,B,C",
            )
        elif key == "hydra/sweeper" and override.value() != SWEEPER:
            yield Problem(
                key,
                f"{override.value()!r}",
                "it would not know which trials are finished",
                "Drop it",
            )


def swept_keys(parsed: Sequence[Override]) -> list[str]:
    """Keys and groups with several values."""
    return [override.key_or_group for override in parsed if override.is_sweep_override()]


def sweep_of(compose: Composer, jobs: Sequence[Checked], keys: Sequence[str]) -> tuple[Sweep | None, list[Problem]]:
    """The sweep that jobs without problems make, and what forbids it.

    Args:
        compose: knows which overrides choose options.
        jobs: in order.
        keys: those with several values.
    """
    first = jobs[0].config
    assert first is not None
    hashes = [config_hash(job.config) for job in jobs if job.config is not None]
    directory = directory_of(first, hashes)
    grouped = first.tracking.wandb_group is not None
    group = [] if grouped else [f"tracking.wandb_group={plain_name(directory.absolute().name)}"]
    trials = [_trial(compose, job, keys, group, config_hash) for job, config_hash in zip(jobs, hashes, strict=True)]
    refused = unmakable(directory)
    problems = [*_repeated(trials), *_never(jobs[0], first), *([refused] if refused else [])]
    return (None, problems) if problems else (joined(directory, trials), [])


def directory_of(config: Config, hashes: Sequence[str]) -> Path:
    """`output_dir`, or a name made of what the trials compute: the same command finds it again."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    together = hashlib.sha256(",".join(sorted(hashes)).encode()).hexdigest()
    return Path("outputs") / config.name / f"sweep-{together[:8]}"


def _trial(compose: Composer, job: Checked, keys: Sequence[str], group: Sequence[str], hashed: str) -> Trial:
    # Hydra repeats its own overrides for every job by itself.
    mine = [override for override in job.parsed if not is_hydras(override)]
    given = {override.key_or_group: override.value() for override in mine}
    values = {key: given[key] for key in keys}
    overrides = [
        f"++{text.lstrip('+')}" if override.key_or_group in job.added else text
        for override in mine
        for text in (without_nulls(compose, override),)
    ]
    return Trial(trial_name(values), values, (*overrides, *job.mounts, *group), hashed)


def _repeated(trials: Sequence[Trial]) -> Iterator[Problem]:
    """Two trials that compute the same thing."""
    seen: dict[str, Trial] = {}
    for trial in trials:
        if trial.config_hash in seen:
            yield Problem(
                next(iter(trial.values)),
                f"trials {seen[trial.config_hash].label} and {trial.label}",
                "they compute the same thing",
                "Drop one of the values",
            )
        seen[trial.config_hash] = trial


def _never(job: Checked, config: Config) -> Iterator[Problem]:
    """`resume=never` where there is a sweep: sweeps are always continued."""
    explicit = any(override.key_or_group == "resume" and str(override.value()) == "never" for override in job.parsed)
    if explicit and config.output_dir is not None and (Path(config.output_dir) / SWEEP_FILE).exists():
        yield Problem(
            "resume",
            f"never, and {config.output_dir} holds a sweep",
            "a sweep goes on where it is",
            "Drop it, or set another output_dir",
        )
