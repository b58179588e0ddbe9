"""Collects what happens and tells every sink."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from opd_trainer.metrics import Metrics
from opd_trainer.tracking.sink import Sink, StepRecord
from opd_trainer.tracking.summary import Evaluated, Results, Summary
from opd_trainer.tracking.wall_time import Phase, WallTime
from opd_trainer.types import Sample
from opd_trainer.updates import UpdateResult


class StepLog:
    """What one step has to tell; made by `Tracker.step`."""

    def __init__(self, wall: WallTime) -> None:
        self.metrics = Metrics()
        self.shown: list[Sample] = []
        self._wall = wall
        self._start = wall.clock()
        self._before = dict(wall.phases)
        self._num_tokens = 0

    def add(self, metrics: Metrics | Mapping[str, float]) -> None:
        """Adds metrics; a name that is there already is averaged (see `Metrics`)."""
        self.metrics.update(metrics)

    def time(self, phase: str) -> Any:
        """A context manager whose seconds count as `phase`; time booked or timed inside counts only there."""
        return self._wall.time(Phase(phase))

    def book(self, phase: str, seconds: float) -> None:
        """Counts seconds, measured elsewhere and contained in those of a surrounding `time`, as `phase`."""
        self._wall.book(Phase(phase), seconds)

    def updated(self, result: UpdateResult) -> None:
        """Tells where the time of an optimizer step went, how its tokens were packed, and how much was computed."""
        self.book(Phase.teacher, result.seconds["teacher"])
        self._num_tokens += len(result.log_probs)
        self.metrics.put("perf/packing_efficiency", result.packing_efficiency)
        self.metrics.put("perf/micro_batches", result.num_micro_batches)
        if result.peak_memory_bytes:
            self.metrics.put("perf/peak_memory_gib", result.peak_memory_bytes / 2**30)
        self.metrics.put("perf/update_tflops", result.flop_per_s / 1e12)
        if result.peak_flop_per_s is not None:
            self.metrics.put("perf/mfu", result.flop_per_s / result.peak_flop_per_s)

    def samples(self, samples: Sequence[Sample]) -> None:
        """Shows samples of the step; how many are kept is the sinks' affair."""
        self.shown.extend(samples)

    def record(self, step: int, results: Results) -> StepRecord:
        """The finished step; phases that took time become metrics."""
        values = self.metrics.values()
        for phase, seconds in self._wall.phases.items():
            if spent := seconds - self._before[phase]:
                values[phase.metric] = spent
        values["perf/step_time"] = self._wall.clock() - self._start
        if self._num_tokens:
            values["perf/tokens_per_s"] = self._num_tokens / values["perf/step_time"]
        return StepRecord(step=step, values=values, samples=tuple(self.shown), results=results)


class Tracker:
    """The run's diary: metrics by step, held-out results, wall time.

    Use as a context manager, so that sinks are closed and the curves are drawn when the run fails as well. Call
    `truncate_after` once before the first step. Save a checkpoint after its step's `with` block, so that a resume
    finds the step's line in the files.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        config_hash: str,
        git: Mapping[str, Any] | None,
        versions: Mapping[str, str],
        wall: WallTime | None = None,
    ) -> None:
        self.results = Results()
        self.steps_done = 0
        self._sinks = tuple(sinks)
        self._config_hash, self._git, self._versions = config_hash, git, versions
        self._wall = wall or WallTime()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def step(self, step: int) -> Iterator[StepLog]:
        """One training step; when it ends without an exception, every sink is told."""
        log = StepLog(self._wall)
        yield log
        self.steps_done = step + 1
        record = log.record(step, self.results)
        for sink in self._sinks:
            sink.write(record)

    def time(self, phase: str) -> Any:
        """Like `StepLog.time`, for what happens outside the steps."""
        return self._wall.time(Phase(phase))

    def evaluated(
        self,
        who: Evaluated,
        scores: Mapping[str, float],
        reverse_kl: float | None = None,
        reference_nll: Mapping[str, float] | None = None,
        standard_error: Mapping[str, float] | None = None,
    ) -> None:
        """Keeps a held-out evaluation for the summary.

        Args:
            who: whose answers were graded.
            scores: pass@1 by dataset.
            reverse_kl: mean reverse KL per token on the fixed held-out prompts, nats, where it was measured.
            reference_nll: negative log-likelihood per token of reference responses by dataset, nats.
            standard_error: of `scores`, by dataset, where it is known.
        """
        self.results.evaluation[who] = dict(scores)
        self.results.standard_error[who] = dict(standard_error or {})
        if reverse_kl is not None:
            self.results.reverse_kl[who] = reverse_kl
        if reference_nll:
            self.results.reference_nll[who] = dict(reference_nll)
        for sink in self._sinks:
            sink.evaluated(who, self.results)

    def truncate_after(self, step: int) -> None:
        """Cuts what earlier processes wrote about steps later than `step`; -1 starts from nothing."""
        for sink in self._sinks:
            sink.truncate_after(step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: wall time, held-out results, steps done; JSON values only."""
        return {
            "wall_s": self._wall.state_dict(),
            "results": self.results.state_dict(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; the wall clock goes on from there."""
        self._wall.load_state_dict(state["wall_s"])
        self.results.load_state_dict(state["results"])
        self.steps_done = state["steps_done"]

    def finish(self) -> Summary:
        """Tells every sink how the run ended, and returns the same."""
        summary = Summary(
            results=self.results,
            steps=self.steps_done,
            wall_s=self._wall.split(),
            config_hash=self._config_hash,
            git=self._git,
            versions=self._versions,
        )
        for sink in self._sinks:
            sink.finish(summary)
        return summary

    def close(self) -> None:
        """Closes every sink. Safe to call twice."""
        for sink in self._sinks:
            sink.close()
