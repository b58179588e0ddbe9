"""Hydra's launcher for `cluster=slurm`."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SlurmLauncher(Launcher):
    """Submits jobs through submitit.

    Differences from hydra-submitit-launcher, whose names the settings have:

    1. A job runs the configuration and the code of the moment of its submission; there each job composes its
       configuration, and imports the code, when it starts.
    2. A job that fails is FAILED in SLURM, with its traceback in its log and at the login node.
    3. Waiting for the jobs is optional, and never for ever.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._context: HydraContext | None = None
        self._config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra. A job runs `opd_trainer.app`, whatever Hydra would call."""
        self._context, self._config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by Hydra with the overrides of each job."""
        # Hydra imports every plugin at every start; what is heavy waits until it is used.
        from opd_trainer.cli.submission import launch

        assert self._context is not None
        assert self._config is not None
        return launch(self._context, self._config, self._settings, job_overrides, initial_job_idx)
