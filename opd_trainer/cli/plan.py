"""What a command line comes to: the overrides for Hydra and the configurations that will run, or every problem."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override

from opd_trainer.cli.aliases import Expanded
from opd_trainer.cli.check import Checked, check, is_hydras, parse_all, several_values, without_nulls
from opd_trainer.cli.composition import Composer, Source
from opd_trainer.cli.named import named_by
from opd_trainer.cli.resume import named_directory_problem, read_run, unfinished
from opd_trainer.cli.validate import validate
from opd_trainer.config import Config, Resume
from opd_trainer.errors import ConfigError, Problem
from opd_trainer.run_record import config_hash


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
    """

    overrides: list[str]
    flags: list[str]
    source: Source
    multirun: bool
    runs: bool
    composes: bool


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
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """A command line without problems.

    Attributes:
        overrides: what Hydra is given.
        configs: the configuration of every job.
    """

    overrides: list[str]
    configs: list[Config]


def plan(compose: Composer, command: Command, expanded: Expanded) -> Plan:
    """Looks at every job of a command.

    Raises:
        ConfigError: with every problem of every job.
    """
    parsed, unreadable = parse_all(compose, command.overrides)
    problems = [*expanded.problems, *unreadable]
    readable = [without_nulls(compose, override) for override in parsed]
    if command.multirun:
        jobs = _jobs(parse_all(compose, readable)[0])
    else:
        problems += [problem for override in parsed for problem in several_values(override)]
        jobs = [[text for text, override in zip(readable, parsed, strict=True) if not override.is_sweep_override()]]
    checked = [check(compose, job) for job in jobs]
    problems += [problem for one in checked for problem in one.problems]
    extra: list[str] = [text for one in checked for text in one.mounts]
    if command.runs:
        problems += [] if command.multirun else _launcher_problem(parsed)
        for one in checked:
            if one.config is not None:
                problems += validate(one.config, named_by(compose, one.parsed, expanded.use_opd))
        if not problems:
            place, wrong = _sweep_place(checked) if command.multirun else _run_place(checked[0])
            extra += place
            problems += wrong
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    added = {key for one in checked for key in one.added}
    given = [
        f"++{text.lstrip('+')}" if override.key_or_group in added else text
        for text, override in zip(readable, parsed, strict=True)
    ]
    return Plan([*given, *dict.fromkeys(extra)], [one.config for one in checked if one.config is not None])


def _jobs(parsed: Sequence[Override]) -> list[list[str]]:
    """The jobs of a sweep; sweeps that need a sweeper of their own (intervals) are left to it."""
    if any(override.is_sweep_override() and not override.is_discrete_sweep() for override in parsed):
        return [[override.input_line or "" for override in parsed if not override.is_sweep_override()]]
    return BasicSweeper.split_arguments(list(parsed), max_batch_size=None)[0]


def _launcher_problem(parsed: Sequence[Override]) -> list[Problem]:
    """Hydra ignores a launcher, without a word, unless it is a multirun."""
    chosen = [o for o in parsed if is_hydras(o) and o.key_or_group == "hydra/launcher" and o.value() != "basic"]
    return [
        Problem("hydra/launcher", f"{o.value()!r} without -m", "Hydra would ignore it and run here", "Add -m")
        for o in chosen
    ]


def _override(key: str, path: Path) -> str:
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{text}'"


def _run_place(job: Checked) -> tuple[list[str], list[Problem]]:
    """Overrides that put a single run where the user wants it, and what forbids that."""
    assert job.config is not None
    config, continues = job.config, job.config.resume is Resume.auto
    wanted = config_hash(config)
    if config.output_dir is not None:
        directory = Path(config.output_dir)
        problem = named_directory_problem(directory, wanted, continues)
        return [_override("hydra.run.dir", directory)], [problem] if problem else []
    # The new run's directory is named after the present moment; its siblings are the earlier runs.
    earlier = unfinished(Path(job.run_dir).parent, wanted) if continues else None
    return ([_override("hydra.run.dir", earlier)] if earlier else []), []


def _sweep_place(jobs: Sequence[Checked]) -> tuple[list[str], list[Problem]]:
    """The same for a sweep, whose jobs have numbered directories below the one that the user names."""
    config = jobs[0].config
    assert config is not None
    if config.output_dir is None:
        lost = Problem(
            "resume",
            "auto in a sweep without output_dir",
            "the earlier sweep cannot be told from others",
            "Set output_dir=DIR, the directory of the sweep to continue",
        )
        return [], [lost] if config.resume is Resume.auto else []
    directory = Path(config.output_dir)
    taken = Problem(
        "output_dir",
        f"{directory} holds a sweep",
        "a second one would mix its files with it",
        "Set resume=auto to continue it, or another output_dir",
    )
    if config.resume is Resume.never and any(read_run(inner) for inner in directory.glob("*")):
        return [], [taken]
    return [_override("hydra.sweep.dir", directory)], []
