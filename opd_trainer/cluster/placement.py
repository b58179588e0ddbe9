"""Who works where: maps groups of workers to the CPUs and GPUs of nodes, or says what is missing. Pure.

Where training and rollout take turns on the same GPUs, each GPU has two lanes, a half for either; otherwise it has one
that anybody may take. A worker that asks for a whole GPU shares it with the other lane only.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from opd_trainer.cluster.config import Layout
from opd_trainer.errors import PreflightError

TINY = 1e-6
TRAINING, ROLLOUT = "training", "rollout"


@dataclass(frozen=True, slots=True)
class Node:
    """A machine.

    Attributes:
        name: its address.
        cpus: logical CPUs for workers.
        gpus: for workers.
    """

    name: str
    cpus: float
    gpus: int


@dataclass(frozen=True, slots=True)
class Demand:
    """A group of workers that wants a place.

    Attributes:
        name: "training", "rollout" or "teacher <name>".
        size: workers.
        cpus: of each.
        gpus: of each; None means 1 where there are GPUs, otherwise 0.
        block: neighbouring ranks that talk in every layer, and belong on one node.
        models: what they hold, for people.
        phases: when they work, for people.
    """

    name: str
    size: int
    cpus: float
    gpus: float | None = None
    block: int = 1
    models: str = ""
    phases: str = ""


@dataclass(frozen=True, slots=True)
class Seat:
    """The place of one worker.

    Attributes:
        group: name of its group.
        rank: in its group.
        node: index of its node.
        gpus: indices of its GPUs on that node, of which it gets `share` each.
        share: of each of its GPUs, 0..1.
        cpus: that it reserves.
    """

    group: str
    rank: int
    node: int
    gpus: tuple[int, ...]
    share: float
    cpus: float


@dataclass(frozen=True, slots=True)
class Placement:
    """A seat for everybody.

    Attributes:
        layout: who shares GPUs.
        nodes: what there is.
        demands: what was asked for.
        seats: in the order of `demands`, then of ranks.
    """

    layout: Layout
    nodes: tuple[Node, ...]
    demands: tuple[Demand, ...]
    seats: tuple[Seat, ...]

    def of(self, group: str) -> list[Seat]:
        """The seats of a group by rank."""
        return [seat for seat in self.seats if seat.group == group]


@dataclass(slots=True)
class _Room:
    """What is left while seats are given away."""

    cpus: list[float]
    lanes: dict[str, list[list[float]]]
    mine: dict[str, list[int]] = field(default_factory=dict)


def place(demands: Sequence[Demand], nodes: Sequence[Node], layout: Layout) -> Placement:
    """Gives every worker a seat; ranks of a group that talk most sit together.

    Raises:
        PreflightError: there is too little of something; the message has the numbers.
    """
    demands, nodes = tuple(_settled(demand, nodes) for demand in demands), tuple(nodes)
    _check_totals(demands, nodes, layout)
    halves = layout is Layout.colocate and all(_gpus(name, demands) for name in (TRAINING, ROLLOUT))
    names = (TRAINING, ROLLOUT) if halves else ("",)
    room = _Room(
        cpus=[node.cpus for node in nodes],
        lanes={name: [[1.0] * node.gpus for node in nodes] for name in names},
    )
    seats: list[Seat] = []
    for demand in demands:
        seats += _seats(demand, demands, nodes, layout, room)
    return Placement(layout, nodes, demands, tuple(seats))


def _settled(demand: Demand, nodes: Sequence[Node]) -> Demand:
    if demand.gpus is not None:
        return demand
    whole = float(any(node.gpus for node in nodes))
    return dataclasses.replace(demand, gpus=whole)


def _gpus(name: str, demands: Sequence[Demand]) -> float:
    return sum(demand.size * (demand.gpus or 0.0) for demand in demands if demand.name == name)


def _check_totals(demands: Sequence[Demand], nodes: Sequence[Node], layout: Layout) -> None:
    """Says what is missing in all, which is easier to understand than who came last."""
    wanted = {demand.name: demand.size * (demand.gpus or 0.0) for demand in demands}
    together = sum(wanted.values())
    shared = min(wanted.get(TRAINING, 0.0), wanted.get(ROLLOUT, 0.0)) if layout is Layout.colocate else 0.0
    _refuse("GPU", demands, wanted, together - shared, sum(node.gpus for node in nodes), nodes, layout)
    cpus = {demand.name: demand.size * demand.cpus for demand in demands}
    _refuse("CPU", demands, cpus, sum(cpus.values()), sum(node.cpus for node in nodes), nodes, layout)


def _refuse(
    kind: str,
    demands: Sequence[Demand],
    wanted: dict[str, float],
    needed: float,
    available: float,
    nodes: Sequence[Node],
    layout: Layout,
) -> None:
    if needed <= available + TINY:
        return
    each = {demand.name: (demand.gpus if kind == "GPU" else demand.cpus) or 0.0 for demand in demands}
    sums = " and ".join(
        f"{demand.size} {demand.name} worker{'s' * (demand.size != 1)} of {each[demand.name]:g} {kind}"
        for demand in demands
        if wanted[demand.name]
    )
    fixes = ["cluster.num_workers or cluster.num_rollout_workers lower"]
    if kind == "CPU":
        fixes += ["cluster.cpus_per_worker lower", "cluster.num_cpus or cluster.cpus_per_node higher"]
    else:
        fixes += ["cluster.gpus_per_worker lower", "cluster.nodes or cluster.gpus_per_node higher"]
        both = wanted.get(TRAINING) and wanted.get(ROLLOUT)
        fixes += ["cluster.layout=colocate"] if layout is Layout.disaggregated and both else []
    raise PreflightError(
        f"cluster: {sums} need {needed:g} {kind}s with cluster.layout={layout}, and there are "
        f"{available:g} on {_count(nodes)}: they would wait for ever. Set {' or '.join(fixes)}."
    )


def _count(nodes: Sequence[Node]) -> str:
    return "the node" if len(nodes) == 1 else f"the {len(nodes)} nodes together"


def _seats(demand: Demand, demands: Sequence[Demand], nodes: Sequence[Node], layout: Layout, room: _Room) -> list[Seat]:
    block = demand.block if demand.size % max(demand.block, 1) == 0 else 1
    if demand.gpus and block > max((int(node.gpus / demand.gpus) for node in nodes), default=0):
        # No node has room for neighbours; they talk over the network then.
        block = 1
    found: list[Seat] = []
    for first in range(0, demand.size, block):
        ranks = range(first, first + block)
        chosen = _block(demand, ranks, _allowed(demand, demands, nodes, layout), room)
        if chosen is None and block > 1:
            chosen = [seat for rank in ranks for seat in _one(demand, rank, demands, nodes, layout, room)]
        found += chosen if chosen is not None else _one(demand, first, demands, nodes, layout, room)
    return found


def _one(
    demand: Demand, rank: int, demands: Sequence[Demand], nodes: Sequence[Node], layout: Layout, room: _Room
) -> list[Seat]:
    chosen = _block(demand, range(rank, rank + 1), _allowed(demand, demands, nodes, layout), room)
    if chosen is None:
        left = ", ".join(
            f"{node.name}: {room.cpus[number]:g} of {node.cpus:g} CPUs, {node.gpus} GPUs"
            for number, node in enumerate(nodes)
        )
        raise PreflightError(
            f"cluster: no node has room for {demand.name} worker {rank} with {demand.cpus:g} CPU and "
            f"{demand.gpus or 0:g} GPU (left: {left}). Set cluster.cpus_per_worker or cluster.gpus_per_worker lower, "
            "or ask for more CPUs or GPUs on each node."
        )
    return chosen


def _allowed(demand: Demand, demands: Sequence[Demand], nodes: Sequence[Node], layout: Layout) -> range:
    """Indices of nodes that a group may sit on: without GPUs, to be apart means to be on other nodes."""
    everywhere = range(len(nodes))
    apart = {TRAINING, ROLLOUT} <= {other.name for other in demands} and layout is Layout.disaggregated
    if not apart or demand.gpus or demand.name not in (TRAINING, ROLLOUT):
        return everywhere
    if len(nodes) == 1:
        raise PreflightError(
            "cluster.layout=disaggregated: there is one node and no GPU, so that nothing can be kept apart. "
            "Set cluster.layout=colocate."
        )
    sizes = {other.name: other.size for other in demands}
    cut = round(len(nodes) * sizes[TRAINING] / (sizes[TRAINING] + sizes[ROLLOUT]))
    cut = min(max(cut, 1), len(nodes) - 1)
    return range(cut) if demand.name == TRAINING else range(cut, len(nodes))


def _block(demand: Demand, ranks: range, allowed: range, room: _Room) -> list[Seat] | None:
    """Seats on one node, taken from `room`; None where no node has them."""
    mine = room.mine.setdefault(demand.name, [0] * len(room.cpus))
    # GPUs are filled in order, so that neighbours stay together; CPUs are shared out evenly.
    order = allowed if demand.gpus else sorted(allowed, key=lambda node: (mine[node], -room.cpus[node], node))
    for node in order:
        if room.cpus[node] + TINY < demand.cpus * len(ranks):
            continue
        gpus = _free_gpus(demand, node, len(ranks), room)
        if gpus is None:
            continue
        room.cpus[node] -= demand.cpus * len(ranks)
        mine[node] += len(ranks)
        share = min(demand.gpus or 0.0, 1.0) * (0.5 if len(room.lanes) > 1 and demand.name in room.lanes else 1.0)
        return [
            Seat(demand.name, rank, node, taken, share, demand.cpus) for rank, taken in zip(ranks, gpus, strict=True)
        ]
    return None


def _free_gpus(demand: Demand, node: int, workers: int, room: _Room) -> list[tuple[int, ...]] | None:
    """The GPUs of each of `workers` on `node`, taken from `room`; None where it has too few."""
    if not demand.gpus:
        return [()] * workers
    lanes = [room.lanes[demand.name]] if demand.name in room.lanes else list(room.lanes.values())
    free = [min(lane[node][gpu] for lane in lanes) for gpu in range(len(lanes[0][node]))]
    part, each = min(demand.gpus, 1.0), max(1, round(demand.gpus))
    chosen: list[tuple[int, ...]] = []
    for _ in range(workers):
        found = [gpu for gpu, left in enumerate(free) if left + TINY >= part][:each]
        if len(found) < each:
            return None
        for gpu in found:
            free[gpu] -= part
        chosen.append(tuple(found))
    for lane in lanes:
        for taken in chosen:
            for gpu in taken:
                lane[node][gpu] -= part
    return chosen


def describe(placement: Placement) -> list[str]:
    """The map as lines of text."""
    lines = [f"placement: {len(placement.nodes)} node{'s' * (len(placement.nodes) != 1)}, {placement.layout}"]
    for number, node in enumerate(placement.nodes):
        lines.append(f"  {node.name}: {node.cpus:g} CPUs, {node.gpus} GPUs")
        here = [seat for seat in placement.seats if seat.node == number]
        for gpus in sorted({seat.gpus for seat in here}):
            groups: dict[tuple[str, float], list[int]] = {}
            for seat in here:
                if seat.gpus == gpus:
                    groups.setdefault((seat.group, seat.share), []).append(seat.rank)
            where = f"GPU {','.join(map(str, gpus))}" if gpus else "CPU"
            seats = "; ".join(
                f"{name} {_ranks(ranks)}" + (f" ({share:g} of it)" if 0 < share < 1 else "")
                for (name, share), ranks in groups.items()
            )
            lines.append(f"    {where}: {seats}")
    for demand in placement.demands:
        workers = f"{demand.size} worker{'s' * (demand.size != 1)}"
        lines.append(f"  {demand.name}: {workers} with {demand.models}; at work during {demand.phases}")
    return lines


def _ranks(ranks: Sequence[int]) -> str:
    """0, 1 or 0-3."""
    if len(ranks) > 1 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))
