"""What a person sees while a run runs: a bar with the time left, a line per step, and a table at the end."""

import math
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from opd_trainer.tracking.sink import StepRecord
from opd_trainer.tracking.summary import Evaluated, Results, Summary

Format = Callable[[float], str]


def percent(share: float) -> str:
    """A share between 0 and 1; a dash where it is not known."""
    return "-" if math.isnan(share) else f"{share:.1%}"


def significant(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


COLUMNS: tuple[tuple[str, str, Format], ...] = (
    ("reward", "rollout/reward", "{:.3f}".format),
    ("reverse KL", "opd/reverse_kl", significant),
    ("loss", "train/loss", significant),
    ("length", "rollout/response_length/mean", "{:.1f}".format),
    ("time", "perf/step_time", "{:.2f} s".format),
)
"""Label, metric and format of a step's line; a metric that a run does not have takes no place."""

ABOUT_LINES = 100
"""Lines of a run whose `every` is not set."""

NAMES = {
    Evaluated.teacher: "teacher",
    Evaluated.before: "student before",
    Evaluated.after: "student after",
}


def change(first: float, last: float) -> str:
    """How a divergence has moved, in words; "" where no ratio says it."""
    if not (first > 0 and last > 0):
        return ""
    ratio = max(first / last, last / first)
    direction = "lower" if last < first else "higher"
    return f"{ratio:.1f} times {direction}" if ratio >= 1.05 else "about the same"


def step_line(record: StepRecord, total_steps: int) -> str:
    """One compact line, in columns that stay aligned from step to step."""
    width = len(str(total_steps))
    cells = [f"step {record.step + 1:>{width}}/{total_steps}"]
    cells += [f"{label} {form(record.values[name]):>8}" for label, name, form in COLUMNS if name in record.values]
    cells += [f"{name} {percent(value)}" for name, value in _evaluations(record).items()]
    return "  ".join(cells)


def _evaluations(record: StepRecord) -> dict[str, float]:
    """Held-out accuracies of the step, by what follows "eval/" in their names."""
    values = record.values.items()
    return {name.removeprefix("eval/"): value for name, value in values if name.endswith("/pass@1")}


def result_table(summary: Summary) -> Table:
    """Teacher, student before and after; reverse KL first and last; where the time went."""
    results = summary.results
    table = Table(title="Result", title_justify="left", show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, style="dim")
    datasets = sorted({name for scores in results.evaluation.values() for name in scores})
    for dataset in datasets:
        teacher = results.evaluation.get(Evaluated.teacher, {}).get(dataset, math.nan)
        for who, label in NAMES.items():
            score = results.evaluation.get(who, {}).get(dataset)
            if score is None:
                continue
            share = (
                f", {percent(score / teacher)} of the teacher's" if who is not Evaluated.teacher and teacher > 0 else ""
            )
            table.add_row(f"{label}", percent(score), f"pass@1 on {dataset}{share}")
    table.add_section()
    first, last = (results.reverse_kl.get(who) for who in (Evaluated.before, Evaluated.after))
    if first is not None:
        table.add_row("reverse KL first", significant(first), "nats per token, held-out prompts")
    if last is not None:
        table.add_row("reverse KL last", significant(last), "" if first is None else change(first, last))
    table.add_section()
    for who, label in NAMES.items():
        for dataset, nll in sorted(results.reference_nll.get(who, {}).items()):
            table.add_row(f"NLL {label}", significant(nll), f"nats per token, reference responses of {dataset}")
    table.add_section()
    total = summary.wall_s["total"]
    table.add_row("wall time", f"{total:.1f} s", f"{summary.steps} steps")
    for name, seconds in summary.wall_s.items():
        if name != "total" and seconds > 0:
            table.add_row(f"  {name}", f"{seconds:.1f} s", percent(seconds / total))
    return table


class ConsoleSink:
    """Rich output on a terminal; plain lines, unwrapped, where the output goes to a file or a pipe."""

    def __init__(
        self, total_steps: int, *, every: int | None, curves: Path, title: str, console: Console | None = None
    ) -> None:
        self._total_steps, self._curves, self._title = total_steps, curves, title
        self._every = every or max(total_steps // ABOUT_LINES, 1)
        self._console = console or Console(highlight=False)
        self._progress: Progress | None = None
        self._task = None

    def truncate_after(self, step: int) -> None:
        """Starts the bar where the run goes on."""
        if step >= 0:
            self._say(f"resuming after step {step + 1}/{self._total_steps}")
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task(self._title, total=self._total_steps, completed=step + 1)
        self._progress.start()

    def evaluated(self, who: Evaluated, results: Results) -> None:
        """A line per evaluation."""
        cells = [f"{name} {percent(score)}" for name, score in results.evaluation[who].items()]
        if who in results.reverse_kl:
            cells.append(f"reverse KL {significant(results.reverse_kl[who])}")
        cells += [f"NLL {name} {significant(nll)}" for name, nll in results.reference_nll.get(who, {}).items()]
        self._say("  ".join([f"{NAMES[who]:<14}", *cells]))

    def write(self, record: StepRecord) -> None:
        """Moves the bar, and prints every n-th step, the last one, and those with an evaluation."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=record.step + 1)
        done = record.step + 1
        if done % self._every == 0 or done == self._total_steps or _evaluations(record):
            self._say(step_line(record, self._total_steps))

    def finish(self, summary: Summary) -> None:
        """The table, and where the curves are."""
        self.close()
        self._console.print()
        self._console.print(result_table(summary))
        self._say(f"curves: {self._curves}")

    def close(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _say(self, line: str) -> None:
        # Text is not searched for markup, and a path must stay in one piece to be copied.
        self._console.print(Text(line), soft_wrap=True)
