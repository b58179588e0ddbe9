"""Runs of the demo: each is executed once per state of the code, and kept with its command, its machine, its metrics.

What is kept of a run, under docs/results/raw, has the form of a run directory: `summary.json`, `metrics.jsonl` with
those metrics that pages, plots and README use, and `origin.json`, which is written here.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, code_state, machine, same_code
from opd_trainer.tracking.files import METRICS, SUMMARY, read_rows

RUNS = ROOT / "outputs" / "results"
TARGET = ROOT / "docs" / "results"
RAW = TARGET / "raw"
ORIGIN = "origin.json"
KEPT = (
    "step",
    "eval/heldout/pass@1",
    "eval/reverse_kl",
    "opd/reverse_kl",
    "rollout/reward",
    "train/rollout_log_prob_diff",
    "perf/step_time",
)
"""Metrics that are kept of every run; all seventy of them would be ten times as much."""
COMMON = ("eval.every=10",)


@dataclass(frozen=True, slots=True)
class Variant:
    """One line of the plots.

    Attributes:
        name: of its run directories.
        title: for people.
        overrides: what differs from the demo.
        colour: of its curves.
    """

    name: str
    title: str
    overrides: tuple[str, ...]
    colour: str


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    Attributes:
        variant: which one.
        seed: of the run.
        origin: content of origin.json: command, state of the code, start, seconds of the whole process, machine.
        summary: content of summary.json.
        rows: lines of metrics.jsonl.
    """

    variant: Variant
    seed: int
    origin: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.variant.name}-{self.seed}"


Planned = tuple[Variant, int]
"""A variant and a seed."""


def overrides(variant: Variant, seed: int) -> list[str]:
    """What is typed after `python launch.py`, less the run directory."""
    return [f"seed={seed}", *COMMON, *variant.overrides]


def load(directory: Path, variant: Variant, seed: int) -> Run:
    """Reads a run directory, or what was kept of one."""
    origin = json.loads((directory / ORIGIN).read_text(encoding="utf-8"))
    summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
    return Run(variant, seed, origin, summary, read_rows(directory / METRICS))


def is_current(origin_file: Path) -> bool:
    """Whether a run ended, and was of the code that is here."""
    if not origin_file.is_file():
        return False
    code = json.loads(origin_file.read_text(encoding="utf-8"))["code"]
    return code is not None and not code["changed"] and same_code(code["commit"])


def launch(command: Sequence[str], directory: Path, *more: str) -> None:
    """`python launch.py` with a run or sweep directory, what it says in a file beside it; then its origin.

    Args:
        command: overrides that say what is computed; variables of the environment in them are replaced.
        directory: of the run.
        more: other overrides.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    log = directory.with_name(f"{directory.name}.log")
    before, code, began = machine(), code_state(), time.perf_counter()
    start = datetime.now(UTC).isoformat(timespec="seconds")
    with log.open("w", encoding="utf-8") as file:
        # A sweep keeps its command line, which is to name no folder of this machine.
        output = f"output_dir={os.path.relpath(directory, ROOT)}"
        full = [sys.executable, "launch.py", *map(os.path.expandvars, command), *more, output]
        done = subprocess.run(full, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(full)} ended with {done.returncode}; see {log}")
    origin = {
        "command": " ".join(["python", "launch.py", *command]),
        "code": code,
        "start": start,
        "process_s": round(time.perf_counter() - began, 1),
        "machine": {**before, "load_average": [before["load_average"], machine()["load_average"]]},
    }
    (directory / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def set_aside_if_stale(directory: Path) -> None:
    """Moves a run of other code out of the way; one that was broken off at this code stays, to be gone on with."""
    begun = directory.with_name(f"{directory.name}.begun")
    code = code_state()
    said = json.loads(begun.read_text(encoding="utf-8")) if begun.is_file() else None
    if directory.exists() and (said is None or said["changed"] or not same_code(said["commit"])):
        directory.rename(directory.with_name(f"{directory.name}-until-{time.time_ns()}"))
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(code), encoding="utf-8")


def execute(variant: Variant, seed: int) -> Run:
    """Runs a variant, or takes the finished run of this very code."""
    directory = RUNS / f"{variant.name}-{seed}"
    if not is_current(directory / ORIGIN):
        set_aside_if_stale(directory)
        print(f"== {variant.title}, seed {seed}", flush=True)
        launch(overrides(variant, seed), directory, "resume=auto")
    return load(directory, variant, seed)


def execute_all(planned: Sequence[Planned], jobs: int) -> list[Run]:
    """Runs what is missing, so many at a time; each takes one thread."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda one: execute(*one), planned))


def keep_run(source: Path, target: Path, more: Iterable[str] = ()) -> None:
    """Copies summary and metrics of a run directory, as far as pages use them; `more` names metrics beside `KEPT`."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / SUMMARY, target / SUMMARY)
    names = tuple(dict.fromkeys((*KEPT, *more)))
    kept = [{name: row[name] for name in names if row.get(name) is not None} for row in read_rows(source / METRICS)]
    (target / METRICS).write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def keep(source: Path, target: Path, more: Iterable[str] = ()) -> None:
    """Copies what the pages are made from."""
    keep_run(source, target, more)
    shutil.copyfile(source / ORIGIN, target / ORIGIN)
