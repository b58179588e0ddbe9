"""The seam of tracking: what the tracker tells, and whom."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from opd_trainer.tracking.summary import Evaluated, Results, Summary
from opd_trainer.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Everything that is known of one finished step.

    Attributes:
        step: from 0.
        values: metric name -> value; NaN where nothing was counted.
        samples: all samples of the step that the controller showed.
        results: held-out figures up to now.
    """

    step: int
    values: Mapping[str, float]
    samples: tuple[Sample, ...]
    results: Results


class Sink(Protocol):
    """One place where metrics go. Called in this order: truncate_after, (evaluated | write)*, finish?, close."""

    def truncate_after(self, step: int) -> None:
        """Forgets what an earlier process wrote about later steps; -1 forgets all."""
        ...

    def evaluated(self, who: Evaluated, results: Results) -> None:
        """A held-out evaluation outside the steps is done."""
        ...

    def write(self, record: StepRecord) -> None:
        """A step is done."""
        ...

    def finish(self, summary: Summary) -> None:
        """The run is done."""
        ...

    def close(self) -> None:
        """Releases everything, after a failure too. Safe to call twice."""
        ...
