"""What a run says about its memory before anything is loaded."""

from opd_trainer.build.vocabulary import Vocabulary
from opd_trainer.cluster.config import Layout, RayCluster
from opd_trainer.config import Config
from opd_trainer.memory.capacity import measured
from opd_trainer.memory.fit import refuse
from opd_trainer.memory.job import job_of
from opd_trainer.memory.plan import plan
from opd_trainer.memory.report import short
from opd_trainer.rollout.config import EmbeddedRollout
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
    cluster = config.cluster
    if not isinstance(cluster, RayCluster):
        return 1.0
    shared = cluster.layout is Layout.colocate and isinstance(config.rollout, EmbeddedRollout)
    asked = 1.0 if cluster.gpus_per_worker is None else cluster.gpus_per_worker
    return min(1.0, asked or 1.0) * (0.5 if shared else 1.0)
