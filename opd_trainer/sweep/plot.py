"""The curves of a sweep on one page: a line per setting, its mean over seeds, with a band from lowest to highest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from opd_trainer.sweep.results import Setting
from opd_trainer.tracking.curves import SMOOTH_ABOVE, Series, series
from opd_trainer.tracking.summary import Evaluated

Row = Mapping[str, Any]
LEGEND_ROWS = 12


def band(axes: Axes, curves: Sequence[Series], *, colour: Any, label: str) -> None:
    """Mean of curves at the steps that all of them have, and the range between the lowest and the highest."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return
    shared = sorted(set.intersection(*(set(curve.x) for curve in curves)))
    values = np.asarray([[dict(zip(curve.x, curve.y, strict=True))[x] for x in shared] for curve in curves])
    axes.plot(shared, values.mean(axis=0), color=colour, lw=2, label=label)
    axes.fill_between(shared, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, lw=0)


def accuracy(rows: Sequence[Row], summary: Mapping[str, Any] | None) -> Series:
    """Held-out accuracy, mean over the datasets, from before the first step to after the last one as far as known."""
    names = sorted({name for row in rows for name in row if name.startswith("eval/") and name.endswith("/pass@1")})
    points: dict[float, float] = {}
    for row in rows:
        found = [row[name] for name in names if row.get(name) is not None]
        if found:
            points[row["step"] + 1.0] = float(np.mean(found))
    if summary is not None:
        for who, x in ((Evaluated.before, 0.0), (Evaluated.after, float(summary["steps"]))):
            scores = list(summary["evaluation"][who.value].values())
            if scores:
                points[x] = float(np.mean(scores))
    steps = sorted(points)
    return Series(np.asarray(steps), np.asarray([points[x] for x in steps]))


def smooth(curve: Series) -> Series:
    """A moving average, of curves long enough for one."""
    return curve.smoothed() if len(curve.x) > SMOOTH_ABOVE else curve


def draw(settings: Sequence[Setting], title: str) -> Figure:
    """Held-out accuracy, reverse KL and reward of every setting; those that nothing was measured of are left out."""
    panels = {
        "Held-out accuracy": lambda outcome: accuracy(outcome.rows, outcome.summary),
        "Reverse KL to the teacher, nats per token": lambda outcome: smooth(series(outcome.rows, "opd/reverse_kl", 0)),
        "Reward of the samples": lambda outcome: smooth(series(outcome.rows, "rollout/reward", 0)),
    }
    curves = {
        name: [[measure(outcome) for outcome in setting.outcomes] for setting in settings]
        for name, measure in panels.items()
    }
    shown = [name for name, found in curves.items() if any(curve for one in found for curve in one)] or list(curves)[:1]
    figure = Figure(figsize=(5.3 * len(shown), 4.8), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    colours = colormaps["viridis"](np.linspace(0.0, 0.9, len(settings)))
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for setting, found, colour in zip(settings, curves[name], colours, strict=True):
            band(axes, found, colour=colour, label=setting.label)
        finish(axes, name)
        if name == "Held-out accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            _teacher(axes, settings)
        elif name.startswith("Reverse KL"):
            axes.set_yscale("symlog", linthresh=1e-4)
        if name == shown[0] and axes.get_legend_handles_labels()[1]:
            axes.legend(loc="lower right", fontsize=8, ncols=-(-len(settings) // LEGEND_ROWS))
    return figure


def finish(axes: Axes, title: str) -> None:
    """Title, grid and the axis of steps."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("optimizer steps done")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _teacher(axes: Axes, settings: Sequence[Setting]) -> None:
    """A line where the teacher is, for each teacher that was evaluated."""
    summaries = [outcome.summary for setting in settings for outcome in setting.outcomes if outcome.summary is not None]
    scores = {tuple(summary["evaluation"][Evaluated.teacher.value].values()) for summary in summaries}
    for score in sorted(scores - {()}):
        level = float(np.mean(score))
        axes.axhline(level, color="black", ls="--", lw=1.2, label=f"teacher: {level:.1%}")


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG; a reader sees the old picture or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    FigureCanvasAgg(figure).print_png(str(temporary))
    temporary.replace(path)
