"""What a run says about its memory before anything is loaded."""

from opd_trainer.build.vocabulary import Vocabulary
from opd_trainer.cluster.config import RayCluster
from opd_trainer.config import Config
from opd_trainer.memory.capacity import measured
from opd_trainer.memory.fit import refuse
from opd_trainer.memory.job import job_of
from opd_trainer.memory.plan import plan
from opd_trainer.memory.report import short
from opd_trainer.task.config import TrainTask


def announce(config: Config, vocabulary: Vocabulary) -> None:
    """Prints the plan's fullest phase.

    Raises:
        PreflightError: the plan does not fit this machine, and `task.check_memory` is true.
    """
    job, capacity = job_of(config, vocabulary), measured()
    if config.tracking.console:
        print(short(plan(job, gpu=capacity.gpu), capacity))
    if not isinstance(config.task, TrainTask) or config.task.check_memory:
        refuse(job, capacity, device_share=device_share(config))


def device_share(config: Config) -> float:
    """The part of a GPU that a process may fill."""
    asked = config.cluster.gpus_per_worker if isinstance(config.cluster, RayCluster) else None
    return 1.0 if not asked else min(1.0, asked)
