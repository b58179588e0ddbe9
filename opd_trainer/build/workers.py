"""Worker groups on the cluster that the configuration asks for."""

from collections.abc import Callable
from typing import Any

import torch

from opd_trainer.cluster.config import RayCluster, SlurmCluster
from opd_trainer.cluster.inprocess import InProcessGroup
from opd_trainer.config import Config
from opd_trainer.megatron.scoring_worker import ScoringSpec
from opd_trainer.protocols import RolloutEngine, WorkerGroup
from opd_trainer.rollout.config import RolloutMode
from opd_trainer.rollout.embedded.engine import EmbeddedEngine
from opd_trainer.rollout.embedded.worker import EmbeddedSpec
from opd_trainer.rollout.group import EngineGroup

MakeWorker = Callable[[int, int, str], Any]


class Workers:
    """Makes worker groups on the cluster that the configuration asks for; groups on Ray share one session."""

    def __init__(self, config: Config) -> None:
        self._cluster, self._timeout_s = config.cluster, config.megatron.timeout_s
        self._overlaps = config.rollout.mode is RolloutMode.one_step_off
        self._session: Any = None

    def training(self, make_worker: MakeWorker) -> WorkerGroup:
        """Megatron workers."""
        if isinstance(self._cluster, RayCluster):
            return self._ray(self._cluster, make_worker, "training", self._cluster.num_workers)
        return InProcessGroup(make_worker, own_thread=self._overlaps)

    def rollout(self, spec: EmbeddedSpec) -> RolloutEngine:
        """Embedded engines: in this process, or as workers that share the prompts."""
        if isinstance(self._cluster, RayCluster):
            return EngineGroup(self._ray(self._cluster, spec.make_worker, "rollout", self._cluster.num_rollout_workers))
        return EmbeddedEngine(spec)

    def dedicated(self, spec: ScoringSpec, name: str, size: int) -> WorkerGroup:
        """Workers of a teacher; only Ray has them."""
        assert isinstance(self._cluster, RayCluster), "checked with the configuration"
        return self._ray(self._cluster, spec.make_worker, name, size)

    def _ray(self, cluster: RayCluster, make_worker: MakeWorker, name: str, size: int) -> WorkerGroup:
        from opd_trainer.cluster.ray import RayGroup, RaySession

        if self._session is None:
            on_slurm = isinstance(cluster, SlurmCluster)
            # In a SLURM job RAY_ADDRESS names the Ray that its tasks form.
            waiting = {"nodes": cluster.nodes, "timeout_s": cluster.start_timeout_s} if on_slurm else {}
            self._session = RaySession(cluster.address, cluster.num_cpus, **waiting)
        gpus = cluster.gpus_per_worker
        return RayGroup(
            self._session,
            make_worker,
            name=name,
            size=size,
            cpus_per_worker=cluster.cpus_per_worker,
            gpus_per_worker=float(torch.cuda.is_available()) if gpus is None else gpus,
            timeout_s=self._timeout_s,
        )
