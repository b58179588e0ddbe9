"""Who sits where, on machines that are not there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_trainer.cluster.config import Layout
from opd_trainer.cluster.placement import ROLLOUT, TRAINING, Demand, Node, Placement, describe, place
from opd_trainer.errors import PreflightError

COLOCATE, DISAGGREGATED = Layout.colocate, Layout.disaggregated


def nodes(number: int, gpus: int = 0, cpus: float = 64) -> list[Node]:
    return [Node(f"n{index}", cpus, gpus) for index in range(number)]


def training(size: int, gpus: float | None = None, block: int = 1) -> Demand:
    return Demand(TRAINING, size, 1, gpus, block)


def rollout(size: int, gpus: float | None = None) -> Demand:
    return Demand(ROLLOUT, size, 1, gpus)


def where(placement: Placement, group: str) -> list[tuple[int, tuple[int, ...], float]]:
    return [(seat.node, seat.gpus, seat.share) for seat in placement.of(group)]


def test_colocated_groups_take_a_half_of_the_same_gpus() -> None:
    found = place([training(4), rollout(2)], nodes(2, gpus=2), COLOCATE)
    assert where(found, TRAINING) == [(0, (0,), 0.5), (0, (1,), 0.5), (1, (0,), 0.5), (1, (1,), 0.5)]
    assert where(found, ROLLOUT) == [(0, (0,), 0.5), (0, (1,), 0.5)]


def test_disaggregated_groups_share_nothing() -> None:
    found = place([training(4), rollout(4)], nodes(2, gpus=4), DISAGGREGATED)
    assert {seat.node for seat in found.of(TRAINING)} == {0}
    assert {seat.node for seat in found.of(ROLLOUT)} == {1}
    assert {seat.share for seat in found.seats} == {1.0}


def test_a_dedicated_teacher_has_gpus_of_its_own_in_both_layouts() -> None:
    teacher = Demand("teacher math", 2, 1)
    found = place([training(2), rollout(2), teacher], nodes(1, gpus=4), COLOCATE)
    assert where(found, "teacher math") == [(0, (2,), 1.0), (0, (3,), 1.0)]
    with pytest.raises(PreflightError, match=r"need 6 GPUs.*there are 4 on the node"):
        place([training(2), rollout(2), teacher], nodes(1, gpus=4), DISAGGREGATED)


def test_what_is_refused_is_counted_and_repaired() -> None:
    with pytest.raises(PreflightError) as refused:
        place([training(8), rollout(4)], nodes(2, gpus=4), DISAGGREGATED)
    message = str(refused.value)
    assert "8 training workers of 1 GPU and 4 rollout workers of 1 GPU need 12 GPUs" in message
    assert "there are 8 on the 2 nodes together" in message
    assert "cluster.layout=colocate" in message
    assert place([training(8), rollout(4)], nodes(2, gpus=4), COLOCATE)
    with pytest.raises(PreflightError, match=r"need 3 CPUs .*there are 2 on the node:"):
        place([training(2), rollout(1)], nodes(1, cpus=2), COLOCATE)


def test_what_fits_in_all_but_on_no_node_is_refused() -> None:
    with pytest.raises(PreflightError, match="no node has room for training worker 0 with 3 CPU"):
        place([Demand(TRAINING, 1, 3)], nodes(2, cpus=2), COLOCATE)


def test_neighbours_stay_on_one_node() -> None:
    # Three GPUs a node: a second pair would straddle, were places given away one by one.
    found = place([training(4, block=2)], nodes(2, gpus=3), COLOCATE)
    assert [seat.node for seat in found.of(TRAINING)] == [0, 0, 1, 1]


def test_neighbours_that_fit_on_no_node_are_spread() -> None:
    found = place([training(4, block=4)], nodes(2, gpus=2), COLOCATE)
    assert [seat.node for seat in found.of(TRAINING)] == [0, 0, 1, 1]


def test_parts_of_a_gpu() -> None:
    found = place([training(2, 0.5), rollout(2, 0.5)], nodes(1, gpus=1), COLOCATE)
    assert where(found, TRAINING) == [(0, (0,), 0.25)] * 2
    assert where(found, ROLLOUT) == [(0, (0,), 0.25)] * 2


def test_without_gpus_workers_spread_over_nodes() -> None:
    found = place([training(4), rollout(2)], nodes(2, cpus=4), COLOCATE)
    assert [seat.node for seat in found.of(TRAINING)] == [0, 1, 0, 1]
    assert [seat.node for seat in found.of(ROLLOUT)] == [0, 1]
    apart = place([training(2), rollout(1)], nodes(2, cpus=4), DISAGGREGATED)
    assert {seat.node for seat in apart.of(TRAINING)} == {0}
    assert {seat.node for seat in apart.of(ROLLOUT)} == {1}


def test_one_node_without_gpus_cannot_keep_anything_apart() -> None:
    with pytest.raises(PreflightError, match=r"nothing can be kept apart. Set cluster.layout=colocate"):
        place([training(2), rollout(1)], nodes(1), DISAGGREGATED)


def test_the_map_names_everybody() -> None:
    lines = describe(
        place([Demand(TRAINING, 2, 1, None, 1, "student, reference", "update"), rollout(1)], nodes(1, gpus=2), COLOCATE)
    )
    assert lines == [
        "placement: 1 node, colocate",
        "  n0: 64 CPUs, 2 GPUs",
        "    GPU 0: training 0 (0.5 of it); rollout 0 (0.5 of it)",
        "    GPU 1: training 1 (0.5 of it)",
        "  training: 2 workers with student, reference; at work during update",
        "  rollout: 1 worker with ; at work during ",
    ]


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 16)), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 4),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, 0.0, 0.5, 1.0]),
    st.sampled_from(list(Layout)),
)
def test_nothing_is_given_away_twice(
    machines: list[tuple[int, int]],
    trainers: int,
    engines: int,
    teachers: int,
    block: int,
    gpus: float | None,
    layout: Layout,
) -> None:
    found = [Node(f"n{index}", cpus, count) for index, (count, cpus) in enumerate(machines)]
    demands = [training(trainers, gpus, block), rollout(engines, gpus)]
    demands += [Demand("teacher", teachers, 1, gpus)] if teachers else []
    try:
        placement = place(demands, found, layout)
    except PreflightError:
        return
    assert len(placement.seats) == trainers + engines + teachers
    for number, node in enumerate(found):
        here = [seat for seat in placement.seats if seat.node == number]
        assert sum(seat.cpus for seat in here) <= node.cpus
        for gpu in range(node.gpus):
            assert sum(seat.share for seat in here if gpu in seat.gpus) <= 1 + 1e-6
        assert all(gpu < node.gpus for seat in here for gpu in seat.gpus)
