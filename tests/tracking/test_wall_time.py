import pytest

from opd_trainer.tracking.wall_time import Phase, WallTime


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_phases_and_other_add_up_to_the_total(clock: Clock) -> None:
    wall = WallTime(clock)
    with wall.time(Phase.rollout):
        clock.now += 3
    clock.now += 1
    with wall.time(Phase.sync):
        clock.now += 0.5
    split = wall.split()
    assert split["rollout"] == 3
    assert split["sync"] == 0.5
    assert split["other"] == 1
    assert split["total"] == 4.5 == sum(seconds for name, seconds in split.items() if name != "total")


def test_time_booked_or_timed_inside_counts_once(clock: Clock) -> None:
    wall = WallTime(clock)
    with wall.time(Phase.update):
        clock.now += 5
        wall.book(Phase.teacher, 2)
        with wall.time(Phase.sync):
            clock.now += 1
    assert wall.phases[Phase.teacher] == 2
    assert wall.phases[Phase.sync] == 1
    assert wall.phases[Phase.update] == 3


def test_a_phase_that_raises_is_counted(clock: Clock) -> None:
    wall = WallTime(clock)

    def fail() -> None:
        with wall.time(Phase.rollout):
            clock.now += 2
            raise ValueError("engine")

    with pytest.raises(ValueError, match="engine"):
        fail()
    assert wall.phases[Phase.rollout] == 2


def test_resume_adds_to_the_earlier_time(clock: Clock) -> None:
    first = WallTime(clock)
    with first.time(Phase.rollout):
        clock.now += 4
    clock.now += 1
    state = first.state_dict()

    later = Clock()
    later.now = 7.0
    second = WallTime(later)
    later.now += 30  # start-up before the checkpoint is loaded belongs to nobody
    second.load_state_dict(state)
    with second.time(Phase.rollout):
        later.now += 2
    assert second.split() == {
        "total": 7, "rollout": 6, "teacher": 0, "update": 0, "sync": 0, "evaluate": 0, "other": 1,
    }  # fmt: skip


def test_metric_names_are_those_of_the_glossary() -> None:
    assert [phase.metric for phase in Phase] == [
        "perf/rollout_time",
        "perf/teacher_time",
        "perf/train_time",
        "perf/sync_time",
        "perf/evaluate_time",
    ]
