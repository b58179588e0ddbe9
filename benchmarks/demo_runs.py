"""Runs of the demo side by side: executed once per commit, as a table and as curves."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from opd_trainer.tracking.curves import Series, series
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


def accuracy_of(run: Run) -> Series:
    """Held-out accuracy from before the first step to after the last."""
    within = series(run.rows, f"eval/{DATASET}/pass@1", 1)
    points = dict(zip(within.x, within.y, strict=True))
    points[0.0] = run.summary["evaluation"]["before"][DATASET]
    points[float(run.summary["steps"])] = run.summary["evaluation"]["after"][DATASET]
    steps = sorted(points)
    return Series(np.asarray(steps), np.asarray([points[x] for x in steps]))


def band(axes: Axes, curves: Sequence[Series], variant: Variant) -> None:
    """Mean over seeds, and the range between the lowest and the highest."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return
    shared = sorted(set.intersection(*(set(curve.x) for curve in curves)))
    values = np.asarray([[dict(zip(curve.x, curve.y, strict=True))[x] for x in shared] for curve in curves])
    axes.plot(shared, values.mean(axis=0), color=variant.colour, lw=2, label=variant.title)
    axes.fill_between(shared, values.min(axis=0), values.max(axis=0), color=variant.colour, alpha=0.18, lw=0)


def plot(runs: Sequence[Run], variants: Sequence[Variant]) -> Figure:
    """Held-out accuracy, reverse KL and reward of all variants."""
    figure = Figure(figsize=(16, 4.6), layout="constrained")
    accuracy, kl, reward = figure.subplots(1, 3)
    for variant in variants:
        mine = [run for run in runs if run.variant == variant]
        band(accuracy, [accuracy_of(run) for run in mine], variant)
        band(kl, [series(run.rows, "opd/reverse_kl", 0) for run in mine], variant)
        band(reward, [series(run.rows, "rollout/reward", 0) for run in mine], variant)
    teachers = {run.summary["evaluation"]["teacher"].get(DATASET) for run in runs} - {None}
    for teacher in teachers:
        accuracy.axhline(teacher, color="black", ls="--", lw=1.2, label=f"teacher: {teacher:.1%}")
    accuracy.set_title("Held-out accuracy (greedy)", loc="left")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    kl.set_title("Reverse KL to the teacher, nats per token", loc="left")
    kl.set_yscale("symlog", linthresh=1e-4)
    reward.set_title("Reward of the samples", loc="left")
    for axes in (accuracy, kl, reward):
        axes.set_xlabel("optimizer steps done")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    accuracy.legend(loc="lower right", fontsize=9)
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
