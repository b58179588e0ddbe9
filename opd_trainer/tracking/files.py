"""The files of a run: `metrics.jsonl` and `samples.jsonl`, which grow with it, and `summary.json` at the end."""

import json
import os
from pathlib import Path
from typing import Any

from opd_trainer.files import write_atomically
from opd_trainer.tracking.sink import StepRecord
from opd_trainer.tracking.summary import Evaluated, Results, Summary, finite
from opd_trainer.types import Sample

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; [] when it does not exist. A last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


class JsonLines:
    """An append-only JSON Lines file whose rows carry their step; every append is on disk when it returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Writes rows in one go."""
        text = "".join(json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def truncate_after(self, step: int) -> None:
        """Keeps the rows up to `step`; the file is replaced as a whole, so a crash loses nothing."""
        if not self.path.exists():
            return
        kept = [row for row in read_rows(self.path) if row["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


class RunFiles:
    """The sink behind `metrics.jsonl`, `samples.jsonl` and `summary.json`."""

    def __init__(self, directory: Path, samples_per_step: int) -> None:
        self._summary = directory / SUMMARY
        self._metrics = JsonLines(directory / METRICS)
        self._samples = JsonLines(directory / SAMPLES)
        self._samples_per_step = samples_per_step

    def truncate_after(self, step: int) -> None:
        """Cuts both files, and removes the summary of an end that is no longer one."""
        self._metrics.truncate_after(step)
        self._samples.truncate_after(step)
        self._summary.unlink(missing_ok=True)

    def evaluated(self, who: Evaluated, results: Results) -> None:
        """Nothing: results outside the steps are in the summary."""

    def write(self, record: StepRecord) -> None:
        """Samples first: a step whose metrics are on disk is complete."""
        shown = record.samples[: self._samples_per_step]
        if shown:
            self._samples.append([sample_row(record.step, sample) for sample in shown])
        self._metrics.append([{"step": record.step, **record.values}])

    def finish(self, summary: Summary) -> None:
        """Writes the summary."""
        summary.write(self._summary)

    def close(self) -> None:
        """Nothing is kept open."""


def sample_row(step: int, sample: Sample) -> dict[str, Any]:
    """One line of `samples.jsonl`."""
    return {
        "step": step,
        "prompt_id": sample.prompt.id,
        "index": sample.index,
        "dataset": sample.prompt.dataset,
        "prompt": sample.prompt.text,
        "response": sample.text,
        "answer": sample.prompt.answer,
        "reward": sample.reward,
        "reward_parts": dict(sample.reward_parts),
        "response_tokens": len(sample.response),
        "finish": sample.finish.value,
        "version": sample.version,
    }
