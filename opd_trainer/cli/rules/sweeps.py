"""Rules about the summary of a sweep."""

from collections.abc import Iterator
from pathlib import Path

from opd_trainer.cli.named import Named
from opd_trainer.cli.rules.common import Rule
from opd_trainer.config import Config
from opd_trainer.errors import Problem
from opd_trainer.sweep.record import SWEEP_FILE
from opd_trainer.task.config import SummarizeTask


def sweep_is_there(config: Config, named: Named) -> Iterator[Problem]:
    """A summary needs a sweep."""
    if not isinstance(config.task, SummarizeTask):
        return
    directory = config.task.sweep_dir
    fix = "Set task.sweep_dir to the directory that `python launch.py -m ...` named when it started"
    if directory is None:
        yield Problem("task.sweep_dir", "null", "there is nothing to summarize", fix)
    elif not (Path(directory) / SWEEP_FILE).is_file():
        yield Problem("task.sweep_dir", directory, f"it holds no {SWEEP_FILE}", fix)


SUMMARIZING: tuple[Rule, ...] = (sweep_is_there,)
