"""Hydra's sweeper for our sweeps: starts the trials that `sweep.json` asks for, each in its own directory.

Hydra accepts plugins below `hydra_plugins` only. The trials are listed in `opd_trainer.cli.sweeps`.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus

from opd_trainer.sweep.record import Sweep

log = logging.getLogger(__name__)


@dataclass
class TrialSweeperConf:
    """It has no settings."""

    _target_: str = "hydra_plugins.opd_trainer_sweeper.TrialSweeper"


ConfigStore.instance().store(group="hydra/sweeper", name="trials", node=TrialSweeperConf, provider="opd_trainer")


class TrialSweeper(BasicSweeper):
    """Launches trials that are not finished; a multirun that is no sweep is Hydra's own affair."""

    def __init__(self) -> None:
        super().__init__(max_batch_size=None)

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the jobs, through whichever launcher is chosen.

        Raises:
            ExceptionGroup: what ended those trials that failed; the others have run.
        """
        assert self.config is not None
        assert self.launcher is not None
        sweep = Sweep.read(Path(self.config.hydra.sweep.dir))
        if sweep is None:
            return super().sweep(arguments)
        trials = [trial for trial in sweep.trials if trial.directory in sweep.launch]
        if not trials:
            return []
        jobs = [[*trial.overrides, f"hydra.sweep.subdir={trial.directory}"] for trial in trials]
        results = self.launcher.launch(jobs, initial_job_idx=0)
        failures = [_error(result) for result in results if result.status is JobStatus.FAILED]
        if failures:
            raise ExceptionGroup(f"{len(failures)} of {len(trials)} trials failed", failures)
        return results


def _error(result: JobReturn) -> Exception:
    error = result._return_value
    assert isinstance(error, Exception)
    return error
