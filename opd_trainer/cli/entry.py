"""From argv to a run: rewrite aliases, check everything, then let Hydra run the job.

Exit codes: 0 done, 2 the user can fix it (a message, no traceback), 1 anything else.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from opd_trainer.cli import aliases
from opd_trainer.cli.check import Checked, check, is_hydras, parse_all, without_nulls
from opd_trainer.cli.composition import Composer, Source, composer
from opd_trainer.cli.named import named_by
from opd_trainer.cli.resume import config_hash, named_directory_problem, read_run, unfinished
from opd_trainer.cli.schema import register
from opd_trainer.cli.validate import validate
from opd_trainer.config import Config, Resume
from opd_trainer.errors import ConfigError, OpdError, Problem, UserError

Run = Callable[[Config, Path], float | None]


def run_app(config: Config, output_dir: Path) -> float | None:
    """Runs the job; everything heavy is imported here."""
    from opd_trainer.app import run

    return run(config, output_dir)


def main(config_dir: Path, argv: Sequence[str] | None = None, run: Run = run_app) -> int:
    """Does what the command line says and returns the exit code.

    Args:
        config_dir: absolute path of conf/.
        argv: arguments without the program's name; None takes this process's.
        run: what to do with each configuration and run directory.
    """
    try:
        _launch(config_dir, list(sys.argv[1:] if argv is None else argv), run)
    except Exception as error:
        _report(error)
        return error.exit_code if isinstance(error, OpdError) else 1
    return 0


def _report(error: Exception) -> None:
    """A user error as plain text, anything else with its traceback."""
    if isinstance(error, UserError):
        print(error, file=sys.stderr)
    else:
        traceback.print_exception(error)


def _launch(config_dir: Path, argv: list[str], run: Run) -> None:
    expanded = aliases.expand(argv)
    args = get_args_parser().parse_args(expanded.argv)
    source = Source(
        directory=Path(args.config_path).absolute() if args.config_path else config_dir.absolute(),
        name=args.config_name or "config",
        extra=str(Path(args.config_dir).absolute()) if args.config_dir else None,
    )
    overrides = list(args.overrides)
    only_shown = args.help or args.hydra_help or args.shell_completion or args.info
    if not only_shown:
        with composer(source) as compose:
            overrides = _checked_overrides(compose, args, expanded)
    given = set(args.overrides)
    flags = [token for token in expanded.argv if token not in given]
    _run_hydra(source, [*overrides, *flags], run)


def _checked_overrides(compose: Composer, args: argparse.Namespace, expanded: aliases.Expanded) -> list[str]:
    """The overrides for Hydra.

    Raises:
        ConfigError: with every problem of every job.
    """
    overrides = list(args.overrides)
    parsed, unreadable = parse_all(compose, overrides)
    problems = [*expanded.problems, *unreadable]
    readable = [without_nulls(compose, override) for override in parsed]
    sweeps = args.multirun or "hydra.mode=MULTIRUN" in overrides
    jobs = _jobs(parse_all(compose, readable)[0]) if sweeps else [readable]
    checked = [check(compose, job) for job in jobs]
    problems += [problem for one in checked for problem in one.problems]
    extra: list[str] = [text for one in checked for text in one.mounts]
    if args.cfg is None:
        if not sweeps:
            problems += _launcher_problem(parsed)
        for one in checked:
            if one.config is not None:
                problems += validate(one.config, named_by(compose, one.parsed, expanded.use_opd))
        if not problems:
            place, wrong = _sweep_place(checked) if sweeps else _run_place(checked[0])
            extra += place
            problems += wrong
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return list(dict.fromkeys([*(checked[0].overrides if not sweeps else readable), *extra]))


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
    if continues:
        # The new run's directory is named after the present moment; its siblings are the earlier runs.
        parent = Path(job.run_dir).parent
        earlier = unfinished(parent, wanted)
        return ([_override("hydra.run.dir", earlier)] if earlier else []), []
    return [], []


def _sweep_place(jobs: Sequence[Checked]) -> tuple[list[str], list[Problem]]:
    """The same for a sweep, whose jobs have numbered directories below the one that the user names."""
    config = jobs[0].config
    assert config is not None
    if config.output_dir is None:
        if config.resume is Resume.auto:
            return [], [
                Problem(
                    "resume",
                    "auto in a sweep without output_dir",
                    "the earlier sweep cannot be told from others",
                    "Set output_dir=DIR, the directory of the sweep to continue",
                )
            ]
        return [], []
    directory = Path(config.output_dir)
    if config.resume is Resume.never and any(read_run(inner) for inner in directory.glob("*")):
        return [], [
            Problem(
                "output_dir",
                f"{directory} holds a sweep",
                "a second one would mix its files with it",
                "Set resume=auto to continue it, or another output_dir",
            )
        ]
    return [_override("hydra.sweep.dir", directory)], []


@contextmanager
def _argv(arguments: Sequence[str]) -> Iterator[None]:
    """Hydra reads `sys.argv` itself, and hides exceptions unless told not to."""
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [before[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def _run_hydra(source: Source, argv: Sequence[str], run: Run) -> None:
    failures: list[Exception] = []

    def job(config: DictConfig) -> float | None:
        built = OmegaConf.to_object(config)
        assert isinstance(built, Config)
        try:
            return run(built, Path(HydraConfig.get().runtime.output_dir))
        except Exception as error:
            failures.append(error)
            raise

    register()
    decorated = hydra.main(version_base="1.3", config_path=str(source.directory), config_name=source.name)(job)
    try:
        with _argv(argv):
            decorated()
    finally:
        # A sweep goes on after a failure, and Hydra raises the first one only.
        for error in failures[1:]:
            _report(error)
