"""`curves.png`: what a run did, on one page."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from opd_trainer.tracking.files import METRICS, read_rows
from opd_trainer.tracking.sink import StepRecord
from opd_trainer.tracking.summary import Evaluated, Results, Summary
from opd_trainer.tracking.wall_time import Phase

Row = Mapping[str, Any]

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#3266ad", "#e08214", "#3a923a", "#c03d3e", "#8d69b8", "#6b6b6b"
PHASE_COLOURS = {
    Phase.rollout: BLUE,
    Phase.teacher: ORANGE,
    Phase.update: GREEN,
    Phase.sync: RED,
    Phase.evaluate: PURPLE,
}
SMOOTH_ABOVE = 20


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over the steps. x counts finished optimizer steps, so that 0 is the untrained student."""

    x: np.ndarray
    y: np.ndarray

    def __bool__(self) -> bool:
        return len(self.x) > 0

    def smoothed(self) -> "Series":
        """A centred moving average over about a tenth of the points."""
        half = max(len(self.y) // 20, 1)
        mean = [self.y[max(i - half, 0) : i + half + 1].mean() for i in range(len(self.y))]
        return Series(self.x, np.asarray(mean))


def series(rows: Sequence[Row], name: str, offset: int) -> Series:
    """The finite values of a metric.

    Args:
        rows: lines of metrics.jsonl.
        name: of the metric.
        offset: 0 for what was measured with the weights before the step's update, 1 for what was measured after it.
    """
    found = [(row["step"] + offset, row[name]) for row in rows if row.get(name) is not None]
    points = np.asarray(found, dtype=float).reshape(-1, 2)
    return Series(points[:, 0], points[:, 1])


def _line(axes: Axes, data: Series, *, unit: str, colour: str, label: str | None = None) -> None:
    axes.set_ylabel(unit)
    noisy = len(data.x) > SMOOTH_ABOVE
    axes.plot(data.x, data.y, color=colour, alpha=0.3 if noisy else 1.0, lw=1.2, label=None if noisy else label)
    if noisy:
        smooth = data.smoothed()
        axes.plot(smooth.x, smooth.y, color=colour, lw=2.0, label=label)


def _accuracy(axes: Axes, rows: Sequence[Row], results: Results) -> None:
    axes.set_ylabel("pass@1")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    names = {
        name.split("/")[1] for row in rows for name in row if name.startswith("eval/") and name.endswith("/pass@1")
    }
    names |= {name for scores in results.evaluation.values() for name in scores}
    for dataset, colour in zip(sorted(names), [BLUE, ORANGE, GREEN, RED, PURPLE] * len(names), strict=False):
        within = series(rows, f"eval/{dataset}/pass@1", 1)
        points = dict(zip(within.x, within.y, strict=True))
        ends = {Evaluated.before: 0.0, Evaluated.after: rows[-1]["step"] + 1.0 if rows else 0.0}
        for who, x in ends.items():
            if dataset in results.evaluation.get(who, {}):
                points[x] = results.evaluation[who][dataset]
        steps = sorted(points)
        axes.plot(steps, [points[x] for x in steps], "o-", color=colour, ms=5, label=f"student, {dataset}")
        for x, side, shift in ((min(steps), "right", -7), (max(steps), "left", 7)) if steps else ():
            label = f"{points[x]:.1%}"
            axes.annotate(label, (x, points[x]), (shift, 0), textcoords="offset points", ha=side, va="center")
        teacher = results.evaluation.get(Evaluated.teacher, {}).get(dataset)
        if teacher is not None:
            axes.axhline(teacher, color=colour, ls="--", lw=1.2, label=f"teacher, {dataset}: {teacher:.1%}")
    axes.margins(x=0.18)  # room for the labels beside the first and the last point
    axes.set_ylim(0, 1.08)
    if names:
        axes.legend(loc="lower right", fontsize=9, framealpha=0.9)


def _reverse_kl(axes: Axes, rows: Sequence[Row], results: Results) -> None:
    data = series(rows, "opd/reverse_kl", 0)
    _line(axes, data, unit="nats per token", colour=RED, label="training samples")
    within = series(rows, "eval/reverse_kl", 1)
    points = dict(zip(within.x, within.y, strict=True))
    ends = {Evaluated.before: 0.0, Evaluated.after: rows[-1]["step"] + 1.0 if rows else 0.0}
    points |= {x: results.reverse_kl[who] for who, x in ends.items() if who in results.reverse_kl}
    held_out = sorted(points.items())
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "D", color="black", ms=6, label="held-out prompts")
    values = [*data.y, *(value for _, value in held_out)]
    # A sampled estimate of a KL near zero can be negative; a log axis would hide exactly that.
    if values and min(values) > 0:
        axes.set_yscale("log")
    if values:
        axes.legend(loc="upper right", fontsize=9, framealpha=0.9)


def _length(axes: Axes, rows: Sequence[Row], results: Results) -> None:
    _line(
        axes,
        series(rows, "rollout/response_length/mean", 0),
        unit="tokens",
        colour=GREEN,
        label="mean",
    )
    longest = series(rows, "rollout/response_length/max", 0)
    if longest:
        axes.plot(longest.x, longest.y, color=GREY, lw=1.0, ls=":", label="longest")
        axes.set_ylim(bottom=0)
        axes.legend(loc="best", fontsize=9, framealpha=0.9)


def _step_time(axes: Axes, rows: Sequence[Row], results: Results) -> None:
    axes.set_ylabel("seconds")
    rows = [row for row in rows if row.get("perf/step_time") is not None]
    x = np.asarray([row["step"] + 1 for row in rows], dtype=float)
    parts = {phase: np.asarray([row.get(phase.metric) or 0.0 for row in rows]) for phase in Phase}
    total = np.asarray([row["perf/step_time"] for row in rows])
    stack = [(phase.value, parts[phase], PHASE_COLOURS[phase]) for phase in Phase if parts[phase].any()]
    stack.append(("other", np.maximum(total - sum(parts.values()), 0.0), "#c9c9c9"))
    bottom = np.zeros_like(x)
    width = float(np.diff(x).min()) if len(x) > 1 else 1.0
    for name, seconds, colour in stack:
        axes.bar(x, seconds, width, bottom=bottom, color=colour, label=f"{name} {seconds.mean():.2f} s")
        bottom = bottom + seconds
    # One slow step (the first compiles and warms up) must not flatten the others.
    axes.set_ylim(0, max(float(np.percentile(total, 98)) * 1.45, 1e-3))
    axes.legend(loc="upper right", fontsize=9, framealpha=0.9, ncols=2, title="mean per step", title_fontsize=9)


def _reward(axes: Axes, rows: Sequence[Row], results: Results) -> None:
    _line(axes, series(rows, "rollout/reward", 0), unit="mean over the step's samples", colour=BLUE)


def _entropy(axes: Axes, rows: Sequence[Row], results: Results) -> None:
    for name in ENTROPY:
        if data := series(rows, name, 0):
            _line(axes, data, unit="nats per token", colour=PURPLE)


def _critic(axes: Axes, rows: Sequence[Row], results: Results) -> None:
    _line(
        axes,
        series(rows, "train/explained_variance", 0),
        unit="explained variance of the returns",
        colour=BLUE,
        label="explained variance",
    )
    # Far below 0 before the critic has learned anything, which must not flatten what comes later.
    axes.set_ylim(-1.0, 1.05)
    losses = axes.twinx()
    _line(losses, series(rows, "train/value_loss", 0), unit="value loss", colour=ORANGE, label="value loss")
    losses.spines["top"].set_visible(False)
    losses.set_ylim(bottom=0)
    handles = [handle for both in (axes, losses) for handle in both.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="lower right", fontsize=9, framealpha=0.9)


def _loss(axes: Axes, rows: Sequence[Row], results: Results) -> None:
    _line(axes, series(rows, "train/loss", 0), unit="loss of the step", colour=BLUE)


def _reference_nll(axes: Axes, rows: Sequence[Row], results: Results) -> None:
    axes.set_ylabel("nats per token")
    before, teacher = (results.reference_nll.get(who, {}) for who in (Evaluated.before, Evaluated.teacher))
    names = {name.split("/")[1] for row in rows for name in row if fnmatchcase(name, "eval/*/reference_nll")}
    colours = [BLUE, ORANGE, GREEN, RED, PURPLE] * len(names | before.keys())
    for dataset, colour in zip(sorted(names | before.keys()), colours, strict=False):
        within = series(rows, f"eval/{dataset}/reference_nll", 1)
        points = dict(zip(within.x, within.y, strict=True))
        if dataset in before:
            points[0.0] = before[dataset]
        axes.plot(*zip(*sorted(points.items()), strict=True), "o-", color=colour, ms=5, label=f"student, {dataset}")
        if dataset in teacher:
            label = f"teacher, {dataset}: {teacher[dataset]:.2f}"
            axes.axhline(teacher[dataset], color=colour, ls="--", lw=1.2, label=label)
    axes.legend(loc="upper right", fontsize=9, framealpha=0.9)


ENTROPY = ("rollout/entropy", "train/entropy")
"""Of sampled responses, or of the responses of a dataset."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One of the plots on the page.

    Attributes:
        title: above it.
        draw: fills the axes.
        metrics: patterns of the names that it shows.
        held_out: it shows held-out results too.
    """

    title: str
    draw: Callable[[Axes, Sequence[Row], Results], None]
    metrics: tuple[str, ...]
    held_out: Callable[[Results], bool] = lambda results: False

    def has_data(self, names: Set[str], results: Results) -> bool:
        """Whether the run has measured anything of it."""
        shown = any(fnmatchcase(name, pattern) for name in names for pattern in self.metrics)
        return shown or self.held_out(results)


def _has_nll(results: Results) -> bool:
    return bool(results.reference_nll)


MAX_PANELS = 6
PANELS = (
    Panel("Reward", _reward, ("rollout/reward",)),
    Panel("Held-out accuracy", _accuracy, ("eval/*/pass@1",), lambda results: any(results.evaluation.values())),
    Panel("Reverse KL to the teacher", _reverse_kl, ("opd/reverse_kl",), lambda results: bool(results.reverse_kl)),
    Panel("Surprise at reference responses", _reference_nll, ("eval/*/reference_nll",), _has_nll),
    Panel("Response length", _length, ("rollout/response_length/mean",)),
    Panel("Critic", _critic, ("train/explained_variance", "train/value_loss")),
    Panel("Entropy of the student", _entropy, ENTROPY),
    Panel("Step time", _step_time, ("perf/step_time",)),
    Panel("Loss", _loss, ("train/loss",)),
)
"""In reading order; the loss of a policy gradient says least, and comes where there is room."""


def draw(rows: Sequence[Row], results: Results, title: str) -> Figure:
    """A panel for each of `PANELS` that has data, at most `MAX_PANELS` of them."""
    # What is 0 in every step, such as the reward of a run without one, shows nothing.
    names = {name for row in rows for name, value in row.items() if value}
    chosen = [panel for panel in PANELS if panel.has_data(names, results)][:MAX_PANELS]
    columns = 3 if len(chosen) > 4 else 2
    num_rows = max(-(-len(chosen) // columns), 1)
    figure = Figure(figsize=(5 * columns, 4 * num_rows), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    axes = figure.subplots(num_rows, columns, squeeze=False).flatten()
    for panel, place in zip(chosen, axes, strict=False):
        panel.draw(place, rows, results)
        place.set_title(panel.title, loc="left", fontsize=11)
        place.set_xlabel("optimizer steps done")
        place.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        place.grid(alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
    for place in axes[len(chosen) :]:
        place.set_visible(False)
    return figure


@dataclass(slots=True)
class CurvesSink:
    """Draws `metrics.jsonl` every n steps and at the end, also when the run fails.

    Attributes:
        directory: of the run.
        every: steps between two drawings; 0 draws at the end only.
        title: above the panels.
    """

    directory: Path
    every: int
    title: str
    _results: Results = field(default_factory=Results)
    _stale: bool = False

    @property
    def path(self) -> Path:
        """The picture."""
        return self.directory / "curves.png"

    def truncate_after(self, step: int) -> None:
        """Nothing: what was cut from the metrics is missing from the next drawing."""

    def evaluated(self, who: Evaluated, results: Results) -> None:
        """Keeps the results for the next drawing."""
        self._results, self._stale = results, True

    def write(self, record: StepRecord) -> None:
        """Draws when it is time to."""
        self._results, self._stale = record.results, True
        if self.every and (record.step + 1) % self.every == 0:
            self._draw()

    def finish(self, summary: Summary) -> None:
        """Draws the whole run."""
        self._results = summary.results
        self._draw()

    def close(self) -> None:
        """Draws what is not drawn yet."""
        if self._stale:
            self._draw()

    def _draw(self) -> None:
        figure = draw(read_rows(self.directory / METRICS), self._results, self.title)
        temporary = self.path.with_name(".curves.png.tmp")
        FigureCanvasAgg(figure).print_png(str(temporary))
        temporary.replace(self.path)
        self._stale = False
