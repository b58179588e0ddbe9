"""Worker groups of Ray actors. Every call has a time limit, and a worker that dies is noticed while nobody calls it."""

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray import exceptions

from opd_trainer.cluster.placement import Demand
from opd_trainer.cluster.rendezvous import free_port
from opd_trainer.cluster.session import RaySession
from opd_trainer.errors import OpdError, WorkerDied, WorkerError

CLOSE_TIMEOUT_S = 30.0
"""How long a healthy worker may take to close before it is killed."""

WATCH_S = 2.0
"""How often idle workers are asked whether they live."""


DEATH_S = 20.0
"""How long Ray may take to notice that a machine is gone."""


async def _answer(actor: Any) -> None:
    await actor.lives.remote()


class _Host:
    """The actor: holds one worker, and says where rank 0 can be met."""

    def __init__(self) -> None:
        self._worker: Any = None

    def rendezvous(self) -> str:
        host = ray.util.get_node_ip_address()
        return f"tcp://{host}:{free_port(host)}"

    def whereabouts(self) -> str:
        return f"process {os.getpid()} at {ray.util.get_node_ip_address()}"

    def create(self, make_worker: Callable[[int, int, str], Any], rank: int, size: int, rendezvous: str) -> None:
        self._worker = make_worker(rank, size, rendezvous)

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self._worker, method)(*args)

    def lives(self) -> bool:
        return True


class RayGroup:
    """Implements `WorkerGroup` with one Ray actor per rank; any class of worker will do.

    Args:
        session: the Ray to run on, shared with other groups.
        make_worker: picklable; builds a worker from (rank, world size, rendezvous).
        demand: how many workers, what each reserves, and what they are called in messages.
        timeout_s: limit on each call.
        env: environment variables of the workers.
    """

    def __init__(
        self,
        session: RaySession,
        make_worker: Callable[[int, int, str], Any],
        demand: Demand,
        *,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._session, self._make_worker, self._demand = session, make_worker, demand
        self._name, self._timeout_s, self._env = demand.name, timeout_s, dict(env or {})
        self._actors: list[Any] = []
        self._open = self._broken = False
        session.expect(demand)

    @property
    def size(self) -> int:
        """Number of workers."""
        return self._demand.size

    async def start(self) -> None:
        """Creates the actors and the workers in them, and calls `start` on each.

        Raises:
            PreflightError: the cluster has too few resources.
            OpdError: a worker raised it.
            WorkerError: a worker failed otherwise.
        """
        await self._session.acquire(self._demand)
        self._open = True
        try:
            self._actors = [self._actor(rank) for rank in range(self.size)]
            (rendezvous,) = await self._gather("rendezvous", [self._actors[0].rendezvous.remote()])
            creations = [
                actor.create.remote(self._make_worker, rank, self.size, rendezvous)
                for rank, actor in enumerate(self._actors)
            ]
            await self._gather("create", creations)
            await self._tell(range(self.size))
            await self.call("start")
        except BaseException:
            await self.close()
            raise

    def _actor(self, rank: int) -> Any:
        options = self._session.options(self._name, rank)
        if self._env:
            options["runtime_env"] = {"env_vars": self._env}
        return ray.remote(_Host).options(**options).remote()

    async def call(self, method: str, *args: Any) -> list[Any]:
        """Calls `method` with the same arguments on every worker at once; results by rank.

        Raises:
            OpdError: a worker raised it.
            WorkerDied: a worker died, or did not answer in time; the group is then unusable.
            WorkerError: a worker raised anything else; likewise.
        """
        return await self.call_each(method, [args] * self.size)

    async def call_each(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Calls `method` with arguments of its own on each worker at once; results by rank; see `call`."""
        if not self._actors:
            raise WorkerError(f"{self._name}: the worker group is not started, or is closed")
        if self._broken:
            raise WorkerError(f"{self._name}: a worker failed before; the group is unusable")
        pairs = zip(self._actors, args, strict=True)
        return await self._gather(method, [actor.call.remote(method, arguments) for actor, arguments in pairs])

    async def replace_dead(self) -> list[int]:
        """Makes new workers for those that died, in their places, and starts them; the group is usable again.

        Only for workers that have nothing to do with each other. Returns the ranks that are new.
        """
        dead = [rank for rank, actor in enumerate(self._actors) if not await self._lives(actor)]
        self._broken = False
        for rank in dead:
            ray.kill(self._actors[rank], no_restart=True)
            self._actors[rank] = self._actor(rank)
        (rendezvous,) = await self._gather("rendezvous", [self._actors[0].rendezvous.remote()])
        await self._tell(dead)
        fresh = [self._actors[rank] for rank in dead]
        await self._gather(
            "create",
            [
                actor.create.remote(self._make_worker, rank, self.size, rendezvous)
                for rank, actor in zip(dead, fresh, strict=True)
            ],
        )
        await self._gather("start", [actor.call.remote("start", ()) for actor in fresh])
        return dead

    async def watch(self) -> None:
        """Returns never; a busy worker answers once it has time.

        Raises:
            WorkerDied: a worker died.
        """
        while True:
            await asyncio.sleep(WATCH_S)
            if not self._actors or self._broken:
                continue
            try:
                await asyncio.gather(*(actor.lives.remote() for actor in self._actors))
            except exceptions.RayError as error:
                if self._actors:
                    self._broken = True
                    raise WorkerDied(f"{self._name}: a worker died: {error}") from error

    async def close(self) -> None:
        """Closes the workers, kills the actors and, if nobody else uses it, ends the Ray that we started."""
        if not self._open:
            return
        if self._actors and not self._broken:
            refs = [actor.call.remote("close", ()) for actor in self._actors]
            # A worker that cannot close in time is killed below, which is all that can still be done.
            with contextlib.suppress(Exception):
                await asyncio.wait_for(asyncio.gather(*refs), CLOSE_TIMEOUT_S)
        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor, no_restart=True)
        self._open = self._broken = False
        self._session.release(self._demand)

    async def _tell(self, ranks: Sequence[int]) -> None:
        found = await self._gather("whereabouts", [self._actors[rank].whereabouts.remote() for rank in ranks])
        for rank, where in zip(ranks, found, strict=True):
            self._session.tell(f"  {self._name} {rank}: {where}")

    async def _death(self) -> BaseException | None:
        """What Ray says of a worker that is dead; None where all that answer are alive."""
        asked = [asyncio.ensure_future(_answer(actor)) for actor in self._actors]
        done, waiting = await asyncio.wait(asked, timeout=DEATH_S, return_when=asyncio.FIRST_EXCEPTION)
        for task in waiting:
            task.cancel()
        return next((task.exception() for task in done if task.exception() is not None), None)

    async def _lives(self, actor: Any) -> bool:
        try:
            await asyncio.wait_for(actor.lives.remote(), self._timeout_s)
        except (exceptions.RayError, TimeoutError):
            return False
        return True

    async def _gather(self, method: str, refs: list[Any]) -> list[Any]:
        try:
            return list(await asyncio.wait_for(asyncio.gather(*refs), self._timeout_s))
        except TimeoutError as error:
            self._broken = True
            raise WorkerDied(f"{self._name}: no answer to {method} within {self._timeout_s:g} s") from error
        except exceptions.RayTaskError as error:
            self._broken = True
            # When one dies the others fail too, in what they do together, and may be heard first.
            if (death := await self._death()) is not None:
                raise WorkerDied(f"{self._name}: a worker died in {method}: {death}") from error
            if isinstance(error.cause, OpdError):
                raise error.cause from error
            raise WorkerError(f"{self._name}: a worker failed in {method}: {error}") from error
        except exceptions.RayError as error:
            self._broken = True
            raise WorkerDied(f"{self._name}: a worker died in {method}: {error}") from error
