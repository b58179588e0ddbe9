"""Worker groups of Ray actors, and the Ray that runs them.

Ray waits for ever for resources that do not exist and for actors that hang; here resources are checked before an actor
is asked for, and every call has a time limit.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray import exceptions

from opd_trainer.cluster.rendezvous import free_port
from opd_trainer.errors import OpdError, PreflightError, WorkerDied, WorkerError

OBJECT_STORE_BYTES = 256 * 1024 * 1024
"""Object store of a Ray that we start: batches and weight buckets pass through it one at a time."""

CLOSE_TIMEOUT_S = 30.0
"""How long a healthy worker may take to close before it is killed."""

FREE_TIMEOUT_S = 10.0
"""How long to wait for resources that exist and are taken: those of killed actors come back after a moment."""

MAX_TEMP_DIR = 36
"""Ray puts Unix sockets below its temporary folder, and their paths may have 107 characters."""


class RaySession:
    """A Ray cluster: one that is there already, or a local one that lives as long as somebody uses it.

    Several worker groups share a session; the local Ray starts with the first and ends with the last of them.

    Args:
        address: cluster to join; None joins that of the environment variable RAY_ADDRESS, or starts a local one.
        num_cpus: logical CPUs of a local one; None means those of the machine.
        nodes: of a cluster that is just starting, with its head on this node; None where it is complete.
        timeout_s: limit on waiting for them.
    """

    def __init__(
        self, address: str | None, num_cpus: int | None, *, nodes: int | None = None, timeout_s: float = 0.0
    ) -> None:
        self._address, self._num_cpus = address or os.environ.get("RAY_ADDRESS"), num_cpus
        self._nodes, self._timeout_s = nodes, timeout_s
        self._users = 0
        self._temp_dir: str | None = None

    def acquire(self) -> None:
        """Starts or joins Ray if nobody has yet.

        Raises:
            PreflightError: this process is already connected to a Ray, or the address does not answer.
        """
        if self._users == 0:
            if ray.is_initialized():
                raise PreflightError("Ray is already initialised in this process: call ray.shutdown() before the run")
            # Ray takes the signal for itself, and ends the process without order.
            handler = signal.getsignal(signal.SIGTERM)
            try:
                if self._address is None:
                    self._start_local()
                else:
                    self._join(self._address)
            finally:
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, handler)
        self._users += 1

    def release(self) -> None:
        """The inverse of `acquire`; the last user shuts Ray down."""
        self._users -= 1
        if self._users:
            return
        ray.shutdown()
        if self._temp_dir is not None:
            shutil.rmtree(self._temp_dir, ignore_errors=True)
            self._temp_dir = None

    def _start_local(self) -> None:
        # Without a token in the environment Ray writes one to the user's home and leaves it there. It stays set, since
        # Ray remembers the first token for the life of the process, and a later session must use the same.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        base = tempfile.gettempdir()
        self._temp_dir = tempfile.mkdtemp(prefix="opd", dir=base if len(base) < MAX_TEMP_DIR else "/tmp")
        try:
            ray.init(
                address="local",
                num_cpus=self._num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                _temp_dir=self._temp_dir,
            )
        except BaseException:
            self._users = 1
            self.release()
            raise

    def _join(self, address: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        # A machine may have several addresses, and Ray looks for itself at one of them.
        here = None if self._nodes is None else address.rpartition(":")[0]
        while True:
            try:
                ray.init(address=address, log_to_driver=False, configure_logging=False, _node_ip_address=here)
                break
            except ConnectionError as error:
                # That of a job which is just starting may not answer yet.
                if time.monotonic() >= deadline:
                    raise PreflightError(
                        f"cluster.address: no Ray cluster answers at {address}: {error}. Start one with "
                        "`ray start --head`, or set cluster.address=null (and unset RAY_ADDRESS) to let us start it."
                    ) from error
                time.sleep(1.0)
        while (alive := sum(node["Alive"] for node in ray.nodes())) < (self._nodes or 1):
            if time.monotonic() > deadline:
                ray.shutdown()
                raise WorkerDied(f"{alive} of {self._nodes} nodes have joined Ray within {self._timeout_s:g} s")
            time.sleep(0.2)


class _Host:
    """The actor: holds one worker, and says where rank 0 can be met."""

    def __init__(self) -> None:
        self._worker: Any = None

    def rendezvous(self) -> str:
        host = ray.util.get_node_ip_address()
        return f"tcp://{host}:{free_port(host)}"

    def create(self, make_worker: Callable[[int, int, str], Any], rank: int, size: int, rendezvous: str) -> None:
        self._worker = make_worker(rank, size, rendezvous)

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self._worker, method)(*args)


class RayGroup:
    """Implements `WorkerGroup` with one Ray actor per rank; any class of worker will do.

    Args:
        session: the Ray to run on, shared with other groups.
        make_worker: picklable; builds a worker from (rank, world size, rendezvous).
        name: what the workers are called in messages.
        size: number of workers.
        cpus_per_worker: logical CPUs that each reserves.
        gpus_per_worker: GPUs that each reserves.
        timeout_s: limit on each call.
    """

    def __init__(
        self,
        session: RaySession,
        make_worker: Callable[[int, int, str], Any],
        *,
        name: str,
        size: int,
        cpus_per_worker: float,
        gpus_per_worker: float,
        timeout_s: float,
    ) -> None:
        self._session, self._make_worker = session, make_worker
        self._name, self._size, self._timeout_s = name, size, timeout_s
        self._needs = {"CPU": cpus_per_worker, "GPU": gpus_per_worker}
        self._actors: list[Any] = []
        self._open = self._broken = False

    @property
    def size(self) -> int:
        """Number of workers."""
        return self._size

    async def start(self) -> None:
        """Creates the actors and the workers in them, and calls `start` on each.

        Raises:
            PreflightError: the cluster has too few resources.
            OpdError: a worker raised it.
            WorkerError: a worker failed otherwise.
        """
        self._session.acquire()
        self._open = True
        try:
            await self._check_resources()
            host = ray.remote(_Host)
            options = {"num_cpus": self._needs["CPU"], "num_gpus": self._needs["GPU"], "max_restarts": 0}
            self._actors = [host.options(**options).remote() for _ in range(self._size)]
            (rendezvous,) = await self._gather("rendezvous", [self._actors[0].rendezvous.remote()])
            creations = [
                actor.create.remote(self._make_worker, rank, self._size, rendezvous)
                for rank, actor in enumerate(self._actors)
            ]
            await self._gather("create", creations)
            await self.call("start")
        except BaseException:
            await self.close()
            raise

    async def call(self, method: str, *args: Any) -> list[Any]:
        """Calls `method` with the same arguments on every worker at once; results by rank.

        Raises:
            OpdError: a worker raised it.
            WorkerError: a worker raised anything else, died, or did not answer in time; the group is then unusable.
        """
        return await self.call_each(method, [args] * self._size)

    async def call_each(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Calls `method` with arguments of its own on each worker at once; results by rank; see `call`."""
        if not self._actors:
            raise WorkerError(f"{self._name}: the worker group is not started, or is closed")
        if self._broken:
            raise WorkerError(f"{self._name}: a worker failed before; the group is unusable")
        pairs = zip(self._actors, args, strict=True)
        return await self._gather(method, [actor.call.remote(method, arguments) for actor, arguments in pairs])

    async def close(self) -> None:
        """Closes the workers, kills the actors and, if nobody else uses it, ends the Ray that we started."""
        if not self._open:
            return
        if self._actors and not self._broken:
            refs = [actor.call.remote("close", ()) for actor in self._actors]
            # A worker that cannot close in time is killed below, which is all that can still be done.
            with contextlib.suppress(Exception):
                await asyncio.wait_for(asyncio.gather(*refs), CLOSE_TIMEOUT_S)
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors, self._open, self._broken = [], False, False
        self._session.release()

    async def _check_resources(self) -> None:
        deadline = time.monotonic() + FREE_TIMEOUT_S
        while short := self._shortage(ray.available_resources()):
            hopeless = self._shortage(ray.cluster_resources())
            if hopeless or time.monotonic() > deadline:
                raise PreflightError(
                    f"{self._name}: {hopeless or short} in the Ray cluster: its workers would wait for ever. Set "
                    "cluster.num_workers, cluster.num_rollout_workers or cluster.gpus_per_worker lower, or "
                    "cluster.num_cpus higher."
                )
            await asyncio.sleep(0.05)

    def _shortage(self, resources: Mapping[str, float]) -> str:
        return " and ".join(
            f"{self._size} workers of {amount:g} {kind} need {self._size * amount:g}, and there are "
            f"{resources.get(kind, 0):g}"
            for kind, amount in self._needs.items()
            if self._size * amount > resources.get(kind, 0) + 1e-6
        )

    async def _gather(self, method: str, refs: list[Any]) -> list[Any]:
        try:
            return list(await asyncio.wait_for(asyncio.gather(*refs), self._timeout_s))
        except TimeoutError as error:
            self._broken = True
            raise WorkerDied(f"{self._name}: no answer to {method} within {self._timeout_s:g} s") from error
        except exceptions.RayTaskError as error:
            self._broken = True
            if isinstance(error.cause, OpdError):
                raise error.cause from error
            raise WorkerError(f"{self._name}: a worker failed in {method}: {error}") from error
        except exceptions.RayError as error:
            self._broken = True
            raise WorkerDied(f"{self._name}: a worker died in {method}: {error}") from error
