"""Hydra's side of `cluster=slurm`: composes every job now, looks at it, and submits what does not have to wait."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from opd_trainer.config import Config
from opd_trainer.errors import ConfigError, Problem
from opd_trainer.slurm.config import SlurmQueue
from opd_trainer.slurm.preflight import look_at
from opd_trainer.slurm.submit import FOLDER, Outcome, ToRun, announce, failure, follow, submit


def launch(
    context: HydraContext,
    config: DictConfig,
    settings: Mapping[str, Any],
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
) -> list[JobReturn]:
    """What the launcher does; a job that failed is a result with its error.

    Raises:
        UserError: a run could not start, or SLURM does not take it.
    """
    setup_globals()
    runs = list(_composed(context, config, job_overrides, initial_job_idx))
    queue = SlurmQueue(**settings)
    _check_signal(runs, queue)
    look_at(runs)
    folder = Path(str(config.hydra.sweep.dir)).absolute() / FOLDER
    jobs = submit(runs, queue, folder)
    announce(jobs)
    if not all(run.cluster.wait for run in runs):
        return [JobReturn(overrides=overrides, status=JobStatus.COMPLETED) for overrides in job_overrides]
    results = []
    for overrides, end in zip(job_overrides, follow(jobs), strict=True):
        failed = end.outcome is Outcome.failed
        result = JobReturn(
            overrides=overrides,
            working_dir=str(end.job.directory),
            status=JobStatus.FAILED if failed else JobStatus.COMPLETED,
        )
        result.return_value = failure(end) if failed else end.value
        results.append(result)
    return results


def _check_signal(runs: Sequence[ToRun], queue: SlurmQueue) -> None:
    """There must be time to go back into the queue when a step did not end in time."""
    late = [run.cluster.grace_s for run in runs if run.cluster.grace_s >= queue.signal_delay_s]
    if late:
        why = "the job would be killed before it goes back into the queue"
        fix = "Set cluster.grace_s lower, or hydra.launcher.signal_delay_s higher"
        what = f"{late[0]:g} s, with a signal {queue.signal_delay_s} s before the end"
        raise ConfigError([Problem("cluster.grace_s", what, why, fix)])


def _composed(
    context: HydraContext, config: DictConfig, job_overrides: Sequence[Sequence[str]], first: int
) -> Iterator[ToRun]:
    for number, overrides in enumerate(job_overrides, first):
        job = context.config_loader.load_sweep_config(config, list(overrides))
        with open_dict(job):
            job.hydra.job.id = job.hydra.job.num = number
        HydraConfig.instance().set_config(job)
        directory = Path(str(job.hydra.sweep.dir)) / str(job.hydra.sweep.subdir)
        with open_dict(job):
            del job["hydra"]
        built = OmegaConf.to_object(job)
        assert isinstance(built, Config)
        yield ToRun(built, directory.absolute())
