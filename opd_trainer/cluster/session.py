"""The Ray that worker groups run on: started or joined, with a place reserved for every worker before any is made.

Ray waits for ever for what does not exist; here the placement is computed from the nodes that there are, and reserving
it has a time limit.
"""

import asyncio
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from opd_trainer.cluster.config import Layout
from opd_trainer.cluster.placement import Demand, Node, Placement, Seat, describe, place
from opd_trainer.errors import NodeLost, PreflightError

OBJECT_STORE_BYTES = 256 * 1024 * 1024
"""Object store of a Ray that we start: batches and weight buckets pass through it one at a time."""

FREE_TIMEOUT_S = 10.0
"""How long to wait for resources that exist and are taken: those of killed actors come back after a moment."""

MAX_TEMP_DIR = 36
"""Ray puts Unix sockets below its temporary folder, and their paths may have 107 characters."""

PIN = 0.001
"""Of the resource that names a node, which has 1.0 of it."""


@dataclass(slots=True)
class _Reserved:
    """What the groups that were started together have.

    Attributes:
        groups: names of those that still use it.
        reservation: Ray's placement group.
        seats: where each worker sits: (group, rank) -> (its seat, its bundle).
    """

    groups: set[str]
    reservation: Any
    seats: dict[tuple[str, int], tuple[Seat, int]]


class RaySession:
    """A Ray cluster: one that is there already, or a local one that lives as long as somebody uses it.

    Worker groups say what they want with `expect`. The first that starts reserves a place for all that have said so by
    then; the last that closes ends the local Ray.

    Args:
        address: cluster to join; None joins that of the environment variable RAY_ADDRESS, or starts a local one.
        num_cpus: logical CPUs of a local one; None means those of the machine.
        layout: who shares GPUs.
        tell: is given the map of who sits where, line by line.
        nodes: of a cluster that is just starting, with its head on this node; None where it is complete.
        timeout_s: limit on waiting for them.
    """

    def __init__(
        self,
        address: str | None,
        num_cpus: int | None,
        *,
        layout: Layout = Layout.colocate,
        tell: Callable[[str], None] = lambda line: None,
        nodes: int | None = None,
        timeout_s: float = 0.0,
    ) -> None:
        self._address, self._num_cpus = address or os.environ.get("RAY_ADDRESS"), num_cpus
        self._layout, self.tell = layout, tell
        self._nodes, self._timeout_s = nodes, timeout_s
        self._users = 0
        self._temp_dir: str | None = None
        self._expected: dict[str, Demand] = {}
        self._reserved: list[_Reserved] = []

    def expect(self, demand: Demand) -> None:
        """Announces a group that will be started."""
        self._expected[demand.name] = demand

    async def acquire(self, demand: Demand) -> None:
        """Starts or joins Ray if nobody has yet, and reserves places for all expected groups if this one has none.

        Raises:
            PreflightError: this process is already connected to a Ray, the address does not answer, or the cluster has
                too few resources.
            NodeLost: nodes are missing.
        """
        if self._users == 0:
            self._connect()
        self._users += 1
        try:
            if not any(demand.name in reserved.groups for reserved in self._reserved):
                self._expected[demand.name] = demand
                await self._reserve()
        except BaseException:
            self.release(demand)
            raise

    def release(self, demand: Demand) -> None:
        """The inverse of `acquire`; the last user shuts Ray down."""
        self._expected.pop(demand.name, None)
        for reserved in list(self._reserved):
            reserved.groups.discard(demand.name)
            if not reserved.groups:
                remove_placement_group(reserved.reservation)
                self._reserved.remove(reserved)
        self._users -= 1
        if self._users == 0:
            self._reserved.clear()
            ray.shutdown()
            if self._temp_dir is not None:
                shutil.rmtree(self._temp_dir, ignore_errors=True)
                self._temp_dir = None

    def options(self, group: str, rank: int) -> dict[str, Any]:
        """Ray's options for the actor of a worker that has a seat."""
        reserved = next(one for one in self._reserved if (group, rank) in one.seats)
        seat, bundle = reserved.seats[group, rank]
        return {
            "num_cpus": seat.cpus,
            "num_gpus": seat.share * len(seat.gpus),
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                reserved.reservation, placement_group_bundle_index=bundle
            ),
        }

    def _connect(self) -> None:
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
            ray.shutdown()
            shutil.rmtree(self._temp_dir, ignore_errors=True)
            self._temp_dir = None
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
                raise NodeLost(f"{alive} of {self._nodes} nodes have joined Ray within {self._timeout_s:g} s")
            time.sleep(0.2)

    async def _reserve(self) -> None:
        taken = {name for reserved in self._reserved for name in reserved.groups}
        demands = [demand for name, demand in self._expected.items() if name not in taken]
        placement = place(demands, self._left(), self._layout)
        for line in describe(placement):
            self.tell(line)
        bundles, seats = _bundles(placement)
        reservation = placement_group(bundles, strategy="PACK")
        deadline = time.monotonic() + FREE_TIMEOUT_S
        while not reservation.wait(0):
            if time.monotonic() > deadline:
                remove_placement_group(reservation)
                if self._nodes is not None:
                    # Nobody else uses the Ray of a job: a node is gone, and Ray has not noticed yet.
                    raise NodeLost(f"a node does not give what it has within {FREE_TIMEOUT_S:g} s")
                raise PreflightError(
                    f"the Ray cluster has {_counted(ray.cluster_resources())}, of which "
                    f"{_counted(ray.available_resources())} are free, and {', '.join(d.name for d in demands)} need "
                    f"{_counted(_sum(bundles))}: somebody else uses the rest. Wait for them, or ask for less."
                )
            await asyncio.sleep(0.05)
        self._reserved.append(_Reserved({demand.name for demand in demands}, reservation, seats))

    def _left(self) -> list[Node]:
        """The nodes, without what groups of this session already have."""
        used: dict[str, list[float]] = {}
        for reserved in self._reserved:
            for spec in reserved.reservation.bundle_specs:
                address = next(key.removeprefix("node:") for key in spec if key.startswith("node:"))
                cpus, gpus = used.get(address, [0.0, 0.0])
                used[address] = [cpus + spec.get("CPU", 0.0), gpus + spec.get("GPU", 0.0)]
        found = []
        for node in ray.nodes():
            if node["Alive"]:
                address, resources = node["NodeManagerAddress"], node["Resources"]
                cpus, gpus = used.get(address, [0.0, 0.0])
                left = Node(address, resources.get("CPU", 0.0) - cpus, round(resources.get("GPU", 0.0) - gpus))
                found.append((0 if "node:__internal_head__" in resources else 1, address, left))
        return [node for _, _, node in sorted(found, key=lambda entry: entry[:2])]


def _bundles(placement: Placement) -> tuple[list[dict[str, float]], dict[tuple[str, int], tuple[Seat, int]]]:
    """What to reserve, each on one node, and where in it each worker sits: those on the same GPU sit together."""
    bundles: list[dict[str, float]] = []
    at: dict[tuple[int, tuple[int, ...]], int] = {}
    seats: dict[tuple[str, int], tuple[Seat, int]] = {}
    for seat in placement.seats:
        number = at.get((seat.node, seat.gpus)) if seat.gpus else None
        if number is None:
            number = len(bundles)
            bundles.append({f"node:{placement.nodes[seat.node].name}": PIN, "CPU": 0.0, "GPU": float(len(seat.gpus))})
            at[seat.node, seat.gpus] = number
        bundles[number]["CPU"] += seat.cpus
        seats[seat.group, seat.rank] = seat, number
    return [{key: amount for key, amount in bundle.items() if amount} for bundle in bundles], seats


def _sum(bundles: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for bundle in bundles:
        for key, amount in bundle.items():
            total[key] = total.get(key, 0.0) + amount
    return total


def _counted(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(kind, 0.0):g} {kind}s" for kind in ("CPU", "GPU"))
