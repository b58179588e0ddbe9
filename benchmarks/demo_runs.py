"""Runs of the demo side by side: executed once per commit, as a table and as curves."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from opd_trainer.sweep.plot import accuracy, band, finish
from opd_trainer.tracking.curves import series
from opd_trainer.tracking.files import METRICS, SUMMARY, read_rows
from opd_trainer.tracking.provenance import git_state

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "outputs" / "results"
TARGET = ROOT / "docs" / "results"
DATASET = "heldout"
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
    """A finished run."""

    variant: Variant
    seed: int
    summary: dict[str, Any]
    rows: list[dict[str, Any]]


def overrides(variant: Variant, seed: int) -> list[str]:
    """What is typed after `python launch.py`, less the run directory."""
    return [f"seed={seed}", *COMMON, *variant.overrides]


def load(directory: Path, variant: Variant, seed: int) -> Run:
    """Reads a run directory."""
    summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
    return Run(variant, seed, summary, read_rows(directory / METRICS))


def execute(variant: Variant, seed: int) -> Run:
    """Runs a variant, or takes the finished run of this very commit."""
    directory = RUNS / f"{variant.name}-{seed}"
    state = git_state(ROOT / "launch.py")
    if (directory / SUMMARY).exists():
        run = load(directory, variant, seed)
        if state is not None and not state["dirty"] and run.summary["git"] == state:
            return run
        directory.rename(directory.with_name(f"{directory.name}-until-{directory.stat().st_mtime_ns}"))
    print(f"== {variant.title}, seed {seed}", flush=True)
    command = [sys.executable, "launch.py", *overrides(variant, seed), f"output_dir={directory}", "resume=auto"]
    subprocess.run(command, cwd=ROOT, check=True)
    return load(directory, variant, seed)


def number(value: float | None, form: str) -> str:
    """A cell of the table; a dash for what was not measured."""
    return "-" if value is None else format(value, form)


def table(runs: Sequence[Run]) -> str:
    """One line per run."""
    columns = ("run", "seed", "teacher", "before", "after", "after / teacher", "reverse KL first", "last", "minutes")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for run in runs:
        scores = {who: values.get(DATASET) for who, values in run.summary["evaluation"].items()}
        share = scores["after"] / scores["teacher"] if scores["after"] is not None and scores["teacher"] else None
        kl = run.summary["reverse_kl"]
        cells = [
            run.variant.title,
            str(run.seed),
            *(number(scores[who], ".1%") for who in ("teacher", "before", "after")),
            number(share, ".1%"),
            *(number(kl[end], ".3g") for end in ("first", "last")),
            number(run.summary["wall_s"]["total"] / 60, ".1f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: Sequence[Run], variants: Sequence[Variant]) -> Figure:
    """Held-out accuracy, reverse KL and reward of all variants."""
    figure = Figure(figsize=(16, 4.6), layout="constrained")
    accuracy_axes, kl_axes, reward_axes = figure.subplots(1, 3)
    for variant in variants:
        mine = [run for run in runs if run.variant == variant]
        look = {"colour": variant.colour, "label": variant.title}
        band(accuracy_axes, [accuracy(run.rows, run.summary) for run in mine], **look)
        band(kl_axes, [series(run.rows, "opd/reverse_kl", 0) for run in mine], **look)
        band(reward_axes, [series(run.rows, "rollout/reward", 0) for run in mine], **look)
    teachers = {run.summary["evaluation"]["teacher"].get(DATASET) for run in runs} - {None}
    for teacher in teachers:
        accuracy_axes.axhline(teacher, color="black", ls="--", lw=1.2, label=f"teacher: {teacher:.1%}")
    finish(accuracy_axes, "Held-out accuracy (greedy)")
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    finish(kl_axes, "Reverse KL to the teacher, nats per token")
    kl_axes.set_yscale("symlog", linthresh=1e-4)
    finish(reward_axes, "Reward of the samples")
    accuracy_axes.legend(loc="lower right", fontsize=9)
    return figure


def made_at(runs: Sequence[Run]) -> str:
    """The commit and the versions behind some runs."""
    git, versions = runs[0].summary["git"], runs[0].summary["versions"]
    commit = (
        "an unknown commit" if git is None else f"commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}"
    )
    return f"{commit}\nwith torch {versions['torch']} and megatron-core {versions['megatron-core']}"


def write(name: str, page: str, figure: Figure) -> None:
    """Writes docs/results/<name>.md and .png."""
    TARGET.mkdir(parents=True, exist_ok=True)
    figure.savefig(TARGET / f"{name}.png", dpi=110)
    (TARGET / f"{name}.md").write_text(page, encoding="utf-8")
    print(f"written: {(TARGET / f'{name}.md').relative_to(ROOT)}")
