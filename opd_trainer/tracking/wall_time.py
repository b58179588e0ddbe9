"""Where the wall time of a run goes, in seconds. Phases never overlap, so that they add up to the total."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum, auto

Clock = Callable[[], float]


class Phase(StrEnum):
    """What a run spends its time on; what no phase claims is "other"."""

    rollout = auto()
    """Generation and rewards."""
    teacher = auto()
    """Scoring by teachers."""
    update = auto()
    """Forward, backward and optimizer of the student, and scoring passes of the old policy and the reference."""
    sync = auto()
    """Weights on their way to the engine."""
    evaluate = auto()
    """Held-out evaluation."""

    @property
    def metric(self) -> str:
        """Name of this phase's metric of one step, seconds."""
        return f"perf/{'train' if self is Phase.update else self.value}_time"


class WallTime:
    """Adds up seconds by phase; survives a resume through `state_dict`."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.phases = dict.fromkeys(Phase, 0.0)
        self._earlier = 0.0
        self._start = clock()

    @property
    def total(self) -> float:
        """Seconds since the run began, without the time between a checkpoint and the resume from it."""
        return self._earlier + self.clock() - self._start

    def book(self, phase: Phase, seconds: float) -> None:
        """Adds seconds that somebody else measured, e.g. those of a teacher inside an update."""
        self.phases[phase] += seconds

    @contextmanager
    def time(self, phase: Phase) -> Iterator[None]:
        """Adds what passes inside, except what is booked to a phase meanwhile."""
        start, booked = self.clock(), sum(self.phases.values())
        try:
            yield
        finally:
            inner = sum(self.phases.values()) - booked
            self.book(phase, max(self.clock() - start - inner, 0.0))

    def split(self) -> dict[str, float]:
        """Seconds: "total", each phase, and "other", which completes them to the total."""
        total = self.total
        return {"total": total, **self.phases, "other": max(total - sum(self.phases.values()), 0.0)}

    def state_dict(self) -> dict[str, float]:
        """The split up to now."""
        return self.split()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continues from the split of an earlier process; the clock starts anew."""
        self._earlier = state["total"]
        self._start = self.clock()
        self.phases = {phase: state[phase] for phase in Phase}
