"""Settings of a sweep x final metrics: for a terminal, as Markdown and as CSV."""

import csv
import io
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from opd_trainer.run_record import RunStatus
from opd_trainer.sweep.results import ACCURACY, MINUTES, Estimate, Outcome, Setting

STATUS = {
    None: "not begun",
    RunStatus.running: "at work, or killed",
    RunStatus.finished: "finished",
    RunStatus.failed: "failed",
    RunStatus.interrupted: "interrupted, to be continued",
}


def keys_of(settings: Sequence[Setting]) -> list[str]:
    """Swept keys, apart from the seed."""
    return list(dict.fromkeys(key for setting in settings for key in setting.values))


def metrics_of(settings: Sequence[Setting]) -> list[str]:
    """Names of all final metrics."""
    found = (name for setting in settings for outcome in setting.outcomes for name in outcome.metrics)
    return list(dict.fromkeys(found))


def number(name: str, value: float) -> str:
    """A final metric: accuracies as percentages."""
    return f"{value:.1%}" if name.startswith(ACCURACY) else f"{value:.3g}"


def cell(name: str, found: Estimate | None) -> str:
    """Mean and standard error; a dash for what was not measured."""
    if found is None:
        return "-"
    mean = number(name, found.mean)
    return mean if found.standard_error is None or name == MINUTES else f"{mean} ± {number(name, found.standard_error)}"


def lines_of(settings: Sequence[Setting]) -> Iterator[list[str]]:
    """The cells of the table, its head first."""
    keys, metrics = keys_of(settings), metrics_of(settings)
    yield [*keys, "trials", *metrics]
    for setting in settings:
        estimates = setting.estimates()
        finished, asked = setting.num_finished, len(setting.outcomes)
        yield [
            *(setting.values.get(key, "") for key in keys),
            str(asked) if finished == asked else f"{finished} of {asked}",
            *(cell(name, estimates.get(name)) for name in metrics),
        ]


def unfinished(settings: Sequence[Setting]) -> list[Outcome]:
    """Trials that do not count (yet)."""
    return [outcome for setting in settings for outcome in setting.outcomes if outcome.summary is None]


def remark(outcome: Outcome) -> str:
    """A line about a trial that does not count."""
    because = f": {outcome.error}" if outcome.error else ""
    return f"{outcome.trial.directory}: {STATUS[outcome.status]}{because}"


def console_table(settings: Sequence[Setting]) -> Table:
    """For a terminal."""
    head, *lines = lines_of(settings)
    num_labels = len(head) - len(metrics_of(settings))
    table = Table(
        title="Sweep: mean ± standard error over seeds", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for place, name in enumerate(head):
        table.add_column(Text(name), justify="left" if place < num_labels else "right")
    for line in lines:
        # Heads may wrap, figures may not.
        table.add_row(*(Text(text.replace(" ", "\N{NO-BREAK SPACE}")) for text in line))
    return table


def markdown(settings: Sequence[Setting]) -> str:
    """A table, and a list of the trials that do not count."""
    head, *lines = lines_of(settings)
    text = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    text.insert(1, "|" + "---|" * len(head))
    left_out = [f"* {remark(outcome)}" for outcome in unfinished(settings)]
    return "\n".join([*text, *(["", *left_out] if left_out else [])]) + "\n"


def settings_csv(settings: Sequence[Setting]) -> str:
    """One line per setting, with full precision."""
    keys, metrics = keys_of(settings), metrics_of(settings)
    lines: list[list[object]] = [
        [*keys, "trials", "finished", *(f"{name} {what}" for name in metrics for what in ("mean", "standard error"))]
    ]
    for setting in settings:
        found = setting.estimates()
        pairs = [(found[name].mean, found[name].standard_error) if name in found else (None, None) for name in metrics]
        cells = [value for pair in pairs for value in pair]
        lines.append(
            [*(setting.values.get(key, "") for key in keys), len(setting.outcomes), setting.num_finished, *cells]
        )
    return _csv(lines)


def trials_csv(settings: Sequence[Setting]) -> str:
    """One line per trial, with full precision."""
    metrics = metrics_of(settings)
    outcomes = [outcome for setting in settings for outcome in setting.outcomes]
    keys = list(dict.fromkeys(key for outcome in outcomes for key in outcome.trial.values))
    lines: list[list[object]] = [["directory", *keys, "status", *metrics]]
    for outcome in outcomes:
        trial, found = outcome.trial, outcome.metrics
        values = [*(trial.values.get(key, "") for key in keys), STATUS[outcome.status]]
        lines.append([trial.directory, *values, *(found.get(name, "") for name in metrics)])
    return _csv(lines)


def _csv(lines: Sequence[Sequence[object]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()
