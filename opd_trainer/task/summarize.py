"""`task=summarize`: what the trials of a sweep amount to by now."""

from pathlib import Path

from opd_trainer.config import Config
from opd_trainer.sweep import report
from opd_trainer.task.config import SummarizeTask


async def summarize(config: Config, output_dir: Path) -> None:
    """Prints the table of `task.sweep_dir` and writes it there, with the curves."""
    assert isinstance(config.task, SummarizeTask)
    assert config.task.sweep_dir is not None, "checked with the configuration"
    report.summarize(Path(config.task.sweep_dir))
