import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_trainer.metrics import Metrics
from opd_trainer.tracking.files import METRICS, SUMMARY, RunFiles, read_rows
from opd_trainer.tracking.sink import Sink, StepRecord
from opd_trainer.tracking.summary import Evaluated, Results, Summary
from opd_trainer.tracking.tracker import Tracker
from opd_trainer.tracking.wall_time import WallTime
from opd_trainer.updates import UpdateResult


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Calls:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.records: list[StepRecord] = []

    def truncate_after(self, step: int) -> None:
        self.calls.append(f"truncate_after {step}")

    def evaluated(self, who: Evaluated, results: Results) -> None:
        self.calls.append(f"evaluated {who.value} {results.evaluation[who]}")

    def write(self, record: StepRecord) -> None:
        self.calls.append(f"write {record.step}")
        self.records.append(record)

    def finish(self, summary: Summary) -> None:
        self.calls.append(f"finish {summary.steps}")

    def close(self) -> None:
        self.calls.append("close")


def tracker_of(*sinks: Sink, clock: Clock | None = None) -> Tracker:
    return Tracker(
        sinks,
        config_hash="c0ffee",
        git={"commit": "abc", "dirty": False},
        versions={"python": "3.11"},
        wall=WallTime(clock or Clock()),
    )


def test_sinks_hear_everything_in_order() -> None:
    sink = Calls()
    with tracker_of(sink) as tracker:
        tracker.truncate_after(-1)
        tracker.evaluated(Evaluated.before, {"heldout": 0.5}, reverse_kl=0.25)
        for step in range(2):
            with tracker.step(step) as log:
                log.add({"x": 1.0})
        tracker.finish()
    assert sink.calls == [
        "truncate_after -1",
        "evaluated before {'heldout': 0.5}",
        "write 0",
        "write 1",
        "finish 2",
        "close",
    ]


def test_metrics_of_a_step_are_combined_and_timed() -> None:
    sink, clock = Calls(), Clock()
    tracker = tracker_of(sink, clock=clock)
    clock.now = 50.0
    with tracker.time("evaluate"):
        clock.now += 9
    with tracker.step(0) as log:
        log.add(Metrics().put("rollout/reward", 1.0, count=3))
        log.add(Metrics().put("rollout/reward", 0.0, count=1))
        log.add({"train/loss": 0.5})
        with log.time("rollout"):
            clock.now += 2
        with log.time("update"):
            clock.now += 4
            log.book("teacher", 1.5)
        clock.now += 1
    assert sink.records[0].values == {
        "rollout/reward": 0.75,
        "train/loss": 0.5,
        "perf/rollout_time": 2.0,
        "perf/teacher_time": 1.5,
        "perf/train_time": 2.5,
        "perf/step_time": 7.0,
    }


def update(**changes: Any) -> UpdateResult:
    """6e12 operations of each worker in 2 + 3 + 1 seconds; the critic's 4 do not count."""
    result = UpdateResult(
        log_probs=torch.zeros(8),
        entropy=torch.zeros(8),
        teacher=None,
        loss=0.0,
        grad_norm=0.0,
        learning_rate=0.0,
        seconds={"teacher": 2.0, "forward_backward": 3.0, "optimizer": 1.0, "critic": 4.0},
        packing_efficiency=0.75,
        num_micro_batches=2,
        flop_per_worker=6e12,
    )
    return dataclasses.replace(result, **changes)


def test_an_update_tells_how_fast_it_computed() -> None:
    sink, clock = Calls(), Clock()
    tracker = tracker_of(sink, clock=clock)
    with tracker.step(0) as log, log.time("update"):
        clock.now += 16
        log.updated(update())
    assert sink.records[0].values == {
        "perf/packing_efficiency": 0.75,
        "perf/micro_batches": 2.0,
        "perf/update_tflops": 1.0,
        "perf/teacher_time": 2.0,
        "perf/train_time": 14.0,
        "perf/step_time": 16.0,
        "perf/tokens_per_s": 0.5,
    }
    with tracker.step(1) as log, log.time("update"):
        clock.now += 8
        log.updated(update(peak_flop_per_s=4e12, peak_memory_bytes=2**29))
        log.updated(update(peak_flop_per_s=4e12, flop_per_worker=12e12))
    found = sink.records[1].values
    assert (found["perf/update_tflops"], found["perf/mfu"], found["perf/peak_memory_gib"]) == (1.5, 0.375, 0.5)


def test_a_phase_that_nobody_knows_is_an_error() -> None:
    with tracker_of().step(0) as log, pytest.raises(ValueError, match="coffee"):
        log.time("coffee")


def test_a_step_that_fails_leaves_no_line_and_closes_the_sinks() -> None:
    sink = Calls()
    with pytest.raises(RuntimeError, match="boom"), tracker_of(sink) as tracker, tracker.step(0):
        raise RuntimeError("boom")
    assert sink.calls == ["close"]
    assert tracker.steps_done == 0


def test_the_summary_is_the_documented_interface(tmp_path: Path) -> None:
    clock = Clock()
    tracker = tracker_of(RunFiles(tmp_path, 0), clock=clock)
    tracker.evaluated(Evaluated.teacher, {"heldout": 0.96})
    before = {"heldout": 0.5}
    tracker.evaluated(Evaluated.before, before, 0.25, reference_nll={"heldout": 1.5}, standard_error={"heldout": 0.03})
    with tracker.step(0) as log, log.time("rollout"):
        clock.now += 2
    clock.now += 1
    after = {"heldout": 0.75, "other": 0.1}
    tracker.evaluated(Evaluated.after, after, float("nan"), standard_error={"heldout": 0.04})
    tracker.finish()
    assert json.loads((tmp_path / SUMMARY).read_text()) == {
        "evaluation": {"before": before, "after": after, "teacher": {"heldout": 0.96}},
        "standard_error": {"before": {"heldout": 0.03}, "after": {"heldout": 0.04}, "teacher": {}},
        "delta": {"heldout": {"value": 0.25, "standard_error": 0.05}},
        "reverse_kl": {"first": 0.25, "last": None},
        "reference_nll": {"before": {"heldout": 1.5}, "after": {}, "teacher": {}},
        "steps": 1,
        "wall_s": {"total": 3.0, "rollout": 2.0, "teacher": 0, "update": 0, "sync": 0, "evaluate": 0, "other": 1.0},
        "config_hash": "c0ffee",
        "git": {"commit": "abc", "dirty": False},
        "versions": {"python": "3.11"},
    }


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path) -> None:
    def steps(tracker: Tracker, clock: Clock, numbers: range) -> None:
        for step in numbers:
            with tracker.step(step) as log, log.time("update"):
                log.add({"train/loss": 1 / (step + 3)})
                clock.now += 1

    def end(tracker: Tracker) -> Summary:
        tracker.evaluated(Evaluated.after, {"heldout": 0.9}, reverse_kl=0.01)
        return tracker.finish()

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    summaries = []
    for directory in (whole, cut):
        directory.mkdir()
        clock = Clock()
        tracker = tracker_of(RunFiles(directory, 0), clock=clock)
        tracker.truncate_after(-1)
        tracker.evaluated(Evaluated.before, {"heldout": 0.5}, reverse_kl=0.2)
        steps(tracker, clock, range(3))
        state = json.loads(json.dumps(tracker.state_dict()))
        steps(tracker, clock, range(3, 6))
        if directory == cut:  # killed after step 5; the last checkpoint is that of step 2
            clock = Clock()
            clock.now = 1000.0
            tracker = tracker_of(RunFiles(directory, 0), clock=clock)
            tracker.load_state_dict(state)
            tracker.truncate_after(2)
            steps(tracker, clock, range(3, 6))
        summaries.append(end(tracker))

    assert (whole / METRICS).read_text() == (cut / METRICS).read_text()
    assert [row["step"] for row in read_rows(cut / METRICS)] == list(range(6))
    assert summaries[0].to_json() == summaries[1].to_json()
