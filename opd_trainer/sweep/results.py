"""What trials came to: the final metrics of each, and mean and standard error over those that share a setting."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_trainer.errors import DataError
from opd_trainer.run_record import RunStatus, read_record
from opd_trainer.sweep.record import SWEEP_FILE, Sweep, Trial
from opd_trainer.tracking.files import METRICS, SUMMARY, read_rows
from opd_trainer.tracking.summary import Evaluated

ACCURACY = "pass@1"
MINUTES = "minutes"
AVERAGED = {"reward": "rollout/reward", "length": "rollout/response_length/mean"}
"""Name -> metric of the steps; the last tenth of the steps counts, since a single step is noisy."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A trial and what its run directory holds.

    Attributes:
        trial: which.
        status: how far it has come; None before it has begun.
        error: what ended it, in a line, if it failed.
        summary: content of summary.json; None unless the trial is finished.
        rows: lines of metrics.jsonl.
    """

    trial: Trial
    status: RunStatus | None
    error: str | None
    summary: Mapping[str, Any] | None
    rows: Sequence[Mapping[str, Any]]

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics by name, in the order of the table; empty unless the trial is finished."""
        if self.summary is None:
            return {}
        found = {
            f"{ACCURACY} {dataset}": value
            for dataset, value in self.summary["evaluation"][Evaluated.after.value].items()
        }
        found["reverse KL"] = self.summary["reverse_kl"]["last"]
        found |= {name: _late_mean(self.rows, metric) for name, metric in AVERAGED.items()}
        found[MINUTES] = self.summary["wall_s"]["total"] / 60
        return {name: value for name, value in found.items() if value is not None}


def _late_mean(rows: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    late = rows[-max(len(rows) // 10, 1) :]
    values = [row[metric] for row in late if row.get(metric) is not None]
    return statistics.fmean(values) if values else None


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean over trials, and its standard error: None of a single trial."""

    mean: float
    standard_error: float | None
    num: int


def estimate(values: Sequence[float]) -> Estimate:
    """Of at least one value; the standard error is the sample's deviation / sqrt(n)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error, len(values))


@dataclass(frozen=True, slots=True)
class Setting:
    """Trials that differ in their seed only."""

    values: Mapping[str, str]
    outcomes: tuple[Outcome, ...]

    @property
    def label(self) -> str:
        """For people."""
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or "all seeds"

    @property
    def num_finished(self) -> int:
        """Trials that count."""
        return sum(outcome.summary is not None for outcome in self.outcomes)

    def estimates(self) -> dict[str, Estimate]:
        """Final metrics over the finished trials."""
        found: dict[str, list[float]] = {}
        for outcome in self.outcomes:
            for name, value in outcome.metrics.items():
                found.setdefault(name, []).append(value)
        return {name: estimate(values) for name, values in found.items()}


def read_outcome(sweep: Sweep, trial: Trial) -> Outcome:
    """Reads a trial's run directory."""
    directory = sweep.place(trial)
    record = read_record(directory)
    file = directory / SUMMARY
    finished = record is not None and record.status is RunStatus.finished and file.is_file()
    return Outcome(
        trial=trial,
        status=None if record is None else record.status,
        error=None if record is None else record.error,
        summary=json.loads(file.read_text(encoding="utf-8")) if finished else None,
        rows=read_rows(directory / METRICS),
    )


def read_settings(directory: Path) -> list[Setting]:
    """The settings of the sweep in `directory`, in the order in which they were asked for.

    Raises:
        DataError: it holds no sweep.
    """
    sweep = Sweep.read(directory)
    if sweep is None:
        raise DataError(
            f"{directory} holds no {SWEEP_FILE}: it is no sweep's directory. Set task.sweep_dir to the directory that "
            "`python launch.py -m ...` named when it started"
        )
    grouped: dict[tuple[tuple[str, str], ...], list[Outcome]] = {}
    for trial in sweep.trials:
        grouped.setdefault(trial.setting, []).append(read_outcome(sweep, trial))
    return [Setting(dict(values), tuple(outcomes)) for values, outcomes in grouped.items()]
