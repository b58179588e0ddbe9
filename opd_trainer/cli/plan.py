"""What a command line comes to: the overrides for Hydra and the configurations that will run, or every problem."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override

from opd_trainer.cli.aliases import Expanded
from opd_trainer.cli.check import Checked, check, is_hydras, parse_all, several_values, without_nulls
from opd_trainer.cli.composition import Composer, Source
from opd_trainer.cli.named import named_by
from opd_trainer.cli.resume import named_directory_problem, unfinished, unmakable
from opd_trainer.cli.sweeps import jobs_of, sweep_of, sweep_problems, swept_keys
from opd_trainer.cli.validate import validate
from opd_trainer.cluster.config import SlurmCluster
from opd_trainer.config import Config, Resume
from opd_trainer.errors import ConfigError, Problem
from opd_trainer.run_record import resume_hash
from opd_trainer.sweep.record import Sweep
from opd_trainer.task.config import ConvertTask, EvaluateTask, PreflightTask, SftTask, TrainTask

QUEUED = (TrainTask, SftTask, EvaluateTask, ConvertTask)
"""Tasks that cluster=slurm submits; the others only look, and do it here."""
STOCK_LAUNCHERS = ("basic", "submitit_local", "submitit_slurm")


@dataclass(frozen=True, slots=True)
class Command:
    """Arguments, apart from what they mean.

    Attributes:
        overrides: `key=value` and `group=option`, in our spelling.
        flags: everything else, for Hydra.
        source: where options come from.
        multirun: a sweep.
        runs: it runs something; False where it only shows the configuration (`--cfg`).
        composes: it needs a configuration of its own; False for `--help` and its like.
        completes: it is about shell completion.
    """

    overrides: list[str]
    flags: list[str]
    source: Source
    multirun: bool
    runs: bool
    composes: bool
    completes: bool


def read(argv: Sequence[str], config_dir: Path) -> Command:
    """Sorts arguments (aliases already rewritten) with Hydra's own parser."""
    # Hydra itself wants all overrides before or after its flags.
    args: argparse.Namespace = get_args_parser().parse_intermixed_args(list(argv))
    overrides = list(args.overrides)
    return Command(
        overrides=overrides,
        flags=[token for token in argv if token not in set(overrides)],
        source=Source(
            directory=Path(args.config_path).absolute() if args.config_path else config_dir.absolute(),
            name=args.config_name or "config",
            extra=str(Path(args.config_dir).absolute()) if args.config_dir else None,
        ),
        multirun=args.multirun or "hydra.mode=MULTIRUN" in overrides,
        runs=args.cfg is None,
        composes=not (args.help or args.hydra_help or args.shell_completion or args.info),
        completes=args.shell_completion,
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """A command line without problems.

    Attributes:
        overrides: what Hydra is given.
        configs: the configuration of every job.
        sweep: its trials, where a key has several values.
    """

    overrides: list[str]
    configs: list[Config]
    sweep: Sweep | None = None


def plan(compose: Composer, command: Command, expanded: Expanded) -> Plan:
    """Looks at every job of a command.

    Raises:
        ConfigError: with every problem of every job.
    """
    parsed, unreadable = parse_all(compose, command.overrides)
    problems = [*expanded.problems, *unreadable]
    readable = [without_nulls(compose, override) for override in parsed]
    if command.multirun:
        problems += sweep_problems(parsed)
        jobs = jobs_of(parse_all(compose, readable)[0])
    else:
        problems += [problem for override in parsed for problem in several_values(override)]
        jobs = [[text for text, override in zip(readable, parsed, strict=True) if not override.is_sweep_override()]]
    checked = [check(compose, job) for job in jobs]
    problems += [problem for one in checked for problem in one.problems]
    extra: list[str] = list(dict.fromkeys(text for one in checked for text in one.mounts))
    sweep: Sweep | None = None
    built = [one.config for one in checked if one.config is not None]
    on_slurm = [config for config in built if isinstance(config.cluster, SlurmCluster)]
    queued = any(isinstance(config.task, QUEUED) and not isinstance(config.task, PreflightTask) for config in on_slurm)
    if command.runs:
        problems += _launcher_problems(parsed, bool(on_slurm), command.multirun)
        # Hydra asks launchers in a multirun only.
        extra += ["hydra.mode=MULTIRUN"] if queued and not command.multirun else []
        for one in checked:
            if one.config is not None:
                problems += validate(one.config, named_by(compose, one.parsed, expanded.use_opd))
        if not problems and (keys := swept_keys(parsed)):
            sweep, wrong = sweep_of(compose, checked, keys)
            problems += wrong
            extra += [] if sweep is None else [_override("hydra.sweep.dir", sweep.directory)]
        elif not problems:
            place, wrong = _run_place(checked[0], command.multirun or queued)
            extra += place
            problems += wrong
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    added = {key for one in checked for key in one.added}
    given = [
        f"++{text.lstrip('+')}" if override.key_or_group in added else text
        for text, override in zip(readable, parsed, strict=True)
    ]
    return Plan([*given, *extra], [one.config for one in checked if one.config is not None], sweep)


def _launcher_problems(parsed: Sequence[Override], queued: bool, multirun: bool) -> Iterator[Problem]:
    """A launcher that Hydra would ignore, or that does not do what the cluster needs."""
    for override in parsed:
        name = override.value()
        if not is_hydras(override) or override.key_or_group != "hydra/launcher":
            continue
        if name == "submitit_slurm" or (queued and name in STOCK_LAUNCHERS):
            why = "with it a failed job looks finished, and a queued one takes what you edit afterwards"
            fix = "Set cluster=slurm, and hydra/launcher=slurm or a profile of yours"
            yield Problem("hydra/launcher", f"{name!r}", why, fix)
        elif not queued and name != "basic" and not multirun:
            why = "Hydra would ignore it and run here"
            yield Problem("hydra/launcher", f"{name!r} without -m", why, "Set cluster=slurm for a job, or add -m")
        elif not queued and name not in STOCK_LAUNCHERS:
            why = "it submits what runs on the nodes of a SLURM job"
            yield Problem("hydra/launcher", f"{name!r} without cluster=slurm", why, "Set cluster=slurm")


def _override(key: str, path: Path) -> str:
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{text}'"


def _run_place(job: Checked, multirun: bool) -> tuple[list[str], list[Problem]]:
    """Overrides that put a single run where the user wants it, and what forbids that."""
    assert job.config is not None
    config, continues = job.config, job.config.resume is Resume.auto
    wanted = resume_hash(config)
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    # A multirun has a directory for each job below its own, which a single job does not need.
    level = ["hydra.sweep.subdir=."] if multirun else []
    if config.output_dir is not None:
        directory = Path(config.output_dir)
        problem = named_directory_problem(directory, wanted, continues)
        return [_override(key, directory), *level], [problem] if problem else []
    # The new run's directory is named after the present moment; its siblings are the earlier runs.
    parent = Path(job.run_dir).parent
    earlier, refused = unfinished(parent, wanted) if continues else None, unmakable(parent)
    return [*([_override(key, earlier)] if earlier else []), *level], [refused] if refused else []
