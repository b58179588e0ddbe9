"""Worker groups on the cluster that the configuration asks for."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

from opd_trainer.build.placement import dedicated_demand, rollout_demand, training_demand
from opd_trainer.cluster.config import RayCluster, SlurmCluster
from opd_trainer.cluster.inprocess import InProcessGroup
from opd_trainer.cluster.placement import Demand
from opd_trainer.config import Config
from opd_trainer.megatron.scoring_worker import ScoringSpec
from opd_trainer.protocols import RolloutEngine, WorkerGroup
from opd_trainer.rollout.config import RolloutMode
from opd_trainer.rollout.embedded.engine import EmbeddedEngine
from opd_trainer.rollout.embedded.worker import EmbeddedSpec
from opd_trainer.rollout.group import EngineGroup
from opd_trainer.teacher.config import DedicatedTeacher

MakeWorker = Callable[[int, int, str], Any]


class Workers:
    """Makes worker groups on the cluster that the configuration asks for; groups on Ray share one session."""

    def __init__(self, config: Config) -> None:
        self._config, self._cluster = config, config.cluster
        self._overlaps = config.rollout.mode is RolloutMode.one_step_off
        self._session: Any = None
        self._watched: list[Any] = []

    def training(self, make_worker: MakeWorker) -> WorkerGroup:
        """Megatron workers."""
        if not isinstance(self._cluster, RayCluster):
            return InProcessGroup(make_worker, own_thread=self._overlaps)
        return self._watch(self._ray(self._cluster, make_worker, training_demand(self._config, self._cluster)))

    def rollout(self, spec: EmbeddedSpec) -> RolloutEngine:
        """Embedded engines: in this process, or as workers that share the prompts."""
        if not isinstance(self._cluster, RayCluster):
            return EmbeddedEngine(spec)
        group = self._ray(self._cluster, spec.make_worker, rollout_demand(self._config, self._cluster))
        return EngineGroup(group, replace_dead=group.replace_dead, max_restarts=self._cluster.max_restarts)

    def dedicated(self, spec: ScoringSpec, name: str, teacher: DedicatedTeacher) -> WorkerGroup:
        """Workers of a teacher; only Ray has them."""
        assert isinstance(self._cluster, RayCluster), "checked with the configuration"
        demand = dedicated_demand(name, teacher, self._config, self._cluster)
        return self._watch(self._ray(self._cluster, spec.make_worker, demand))

    async def guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """Does `work`, and ends it when a worker dies to which nobody happens to talk.

        Raises:
            WorkerDied: one did.
        """
        doing = asyncio.ensure_future(work)
        watching = [asyncio.ensure_future(group.watch()) for group in self._watched]
        try:
            await asyncio.wait([doing, *watching], return_when=asyncio.FIRST_COMPLETED)
            for task in (doing, *watching):
                if task.done():
                    return await task
        finally:
            for task in (doing, *watching):
                task.cancel()
            await asyncio.gather(doing, *watching, return_exceptions=True)

    def _watch(self, group: Any) -> Any:
        self._watched.append(group)
        return group

    def _ray(self, cluster: RayCluster, make_worker: MakeWorker, demand: Demand) -> Any:
        from opd_trainer.cluster.ray import RayGroup
        from opd_trainer.cluster.session import RaySession

        if self._session is None:
            on_slurm = isinstance(cluster, SlurmCluster)
            # In a SLURM job RAY_ADDRESS names the Ray that its tasks form.
            waiting = {"nodes": cluster.nodes, "timeout_s": cluster.start_timeout_s} if on_slurm else {}
            shown = self._config.tracking.console
            tell = functools.partial(print, flush=True) if shown else lambda line: None
            self._session = RaySession(cluster.address, cluster.num_cpus, layout=cluster.layout, tell=tell, **waiting)
        return RayGroup(self._session, make_worker, demand, timeout_s=self._config.megatron.timeout_s, env=cluster.env)
