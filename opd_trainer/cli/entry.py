"""From argv to a run: rewrite aliases, check everything, then let Hydra run the jobs.

Exit codes: 0 done, 2 the user can fix it (a message, no traceback), 1 anything else.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from opd_trainer.cli.aliases import expand
from opd_trainer.cli.completion import LINE, asked_about, for_any_python, hydras_line
from opd_trainer.cli.composition import Source, composer
from opd_trainer.cli.plan import Plan, plan, read
from opd_trainer.cli.schema import register
from opd_trainer.config import Config
from opd_trainer.errors import OpdError
from opd_trainer.sweep.record import Sweep

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
    except SystemExit as stop:
        # Hydra's own --help and --info, and argparse.
        return stop.code if isinstance(stop.code, int) else 0
    except Exception as error:
        return _report(error)
    return 0


def _report(error: Exception) -> int:
    """An error that explains itself as plain text, anything else with its traceback; the exit code."""
    if isinstance(error, ExceptionGroup):
        # Trials of a sweep: 2 only if the user can fix every one of them.
        codes = [_report(inner) for inner in error.exceptions]
        print(error.message, file=sys.stderr)
        return min(codes)
    if isinstance(error, OpdError) and error.explains_itself:
        print(error, file=sys.stderr)
    else:
        traceback.print_exception(error)
    return error.exit_code if isinstance(error, OpdError) else 1


def _launch(config_dir: Path, argv: list[str], run: Run) -> None:
    expanded = expand(argv)
    command = read(expanded.argv, config_dir)
    if command.completes:
        _complete(command.source, argv, run)
        return
    planned = Plan(command.overrides, [])
    if command.composes:
        with composer(command.source) as compose:
            planned = plan(compose, command, expanded)
    arguments = [*planned.overrides, *command.flags]
    if planned.sweep is None:
        _run_hydra(command.source, arguments, run)
    else:
        _run_sweep(planned.sweep, command.source, arguments, run)


def _complete(source: Source, argv: list[str], run: Run) -> None:
    """Hydra tells how the shell's line may go on, or, without one, what the shell must run to ask."""
    if LINE not in os.environ:
        with redirect_stdout(StringIO()) as said:
            _run_hydra(source, argv, run)
        print(for_any_python(said.getvalue()), end="")
        return
    with composer(source) as compose:
        line = hydras_line(compose, os.environ[LINE])
    with asked_about(line):
        _run_hydra(source, argv, run)


def _run_sweep(sweep: Sweep, source: Source, arguments: list[str], run: Run) -> None:
    """Runs the trials that are not finished, and tells what all of them amount to, whatever becomes of this process."""
    sweep.write()
    print(f"sweep: {sweep.directory}, {len(sweep.launch)} of {len(sweep.trials)} trials to run", flush=True)
    try:
        _run_hydra(source, arguments, run)
    finally:
        if any(sweep.status(trial) for trial in sweep.trials):
            from opd_trainer.sweep.report import summarize

            summarize(sweep.directory)


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
        hydra_config = HydraConfig.get()
        try:
            return run(built, Path(hydra_config.runtime.output_dir))
        except Exception as error:
            if hydra_config.mode is RunMode.MULTIRUN:
                # Perhaps in another process; the sweeper collects it.
                raise
            # Hydra would print a line of its own above the message.
            failures.append(error)
            return None

    register()
    decorated = hydra.main(version_base="1.3", config_path=str(source.directory), config_name=source.name)(job)
    with _argv(argv):
        decorated()
    if failures:
        raise failures[0]
