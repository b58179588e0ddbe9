"""Pages of docs/results about runs of the demo: table, curves, commands and where they are from.

A page is made from what is kept under docs/results/raw and from nothing else: it can be made again (`--redraw`).
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.demo_runs import RAW, ROOT, RUNS, TARGET, Planned, Run, Variant, execute_all, keep, load, overrides
from opd_trainer.sweep.plot import accuracy, band, finish
from opd_trainer.tracking.curves import series

DATASET = "heldout"


@dataclass(frozen=True, slots=True)
class Page:
    """A page about some runs.

    Attributes:
        name: of the files docs/results/<name>.md and .png, and of the folder below raw.
        planned: its runs.
        text: the page.
        figure: the picture.
        metrics: that it needs beside those that are kept of every run.
    """

    name: str
    planned: Sequence[Planned]
    text: Callable[[Sequence[Run]], str]
    figure: Callable[[Sequence[Run]], Figure]
    metrics: Sequence[str] = ()

    def kept(self) -> list[Run]:
        """Its runs as they are kept."""
        return [load(RAW / self.name / f"{variant.name}-{seed}", variant, seed) for variant, seed in self.planned]

    def run(self, jobs: int) -> None:
        """Runs what is missing, and keeps it."""
        for run in execute_all(self.planned, jobs):
            keep(RUNS / run.name, RAW / self.name / run.name, self.metrics)

    def draw(self) -> None:
        """Writes page and picture."""
        runs = self.kept()
        write(self.name, self.text(runs), self.figure(runs))
        print(table(runs))


def main(page: Page) -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(description="Runs of the demo, with a page and a plot in docs/results.")
    parser.add_argument("--redraw", action="store_true", help="make page and plot from docs/results/raw; run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    arguments = parser.parse_args()
    if not arguments.redraw:
        page.run(arguments.jobs)
    page.draw()


def write(name: str, page: str, figure: Figure) -> None:
    """Writes docs/results/<name>.md and .png."""
    TARGET.mkdir(parents=True, exist_ok=True)
    figure.set_dpi(110)
    FigureCanvasAgg(figure).print_png(str(TARGET / f"{name}.png"))
    (TARGET / f"{name}.md").write_text(page, encoding="utf-8")
    print(f"written: {(TARGET / f'{name}.md').relative_to(ROOT)}")


def number(value: float | None, form: str) -> str:
    """A cell of the table; a dash for what was not measured."""
    return "-" if value is None else format(value, form)


def table(runs: Sequence[Run]) -> str:
    """One line per run."""
    columns = (
        *("run", "seed", "teacher", "before", "after", "after / teacher", "reverse KL first", "last", "minutes"),
        "configuration",
    )
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
            f"`{run.summary['config_hash']}`",
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


def commands(planned: Sequence[Planned]) -> str:
    """The command of each run; runs that differ in the seed only are one line."""
    seeds: dict[Variant, list[str]] = {}
    for variant, seed in planned:
        seeds.setdefault(variant, []).append(str(seed))
    lines = []
    for variant, mine in seeds.items():
        several = ["-m"] if len(mine) > 1 else []
        lines.append(" ".join(["python launch.py", *several, f"seed={','.join(mine)}", *overrides(variant, 0)[1:]]))
    return "\n".join(["```", *lines, "```"])


def state(code: dict[str, Any] | None) -> str:
    """Which code that was."""
    return "an unknown commit" if code is None else f"commit {code['commit'][:12]}{' with changes' * code['changed']}"


def place(one: dict[str, Any]) -> str:
    """A machine."""
    return f"{one['cores']} cores of {one['processor']}, {one['memory_gib']} GiB, {one['system']}"


def made_at(origins: Sequence[dict[str, Any]], versions: dict[str, str]) -> str:
    """Commit, versions, date and machine behind some runs."""
    days = sorted(origin["start"][:10] for origin in origins)
    machines = [origin["machine"] for origin in origins]
    loads = [load for one in machines for load in one["load_average"]]
    packages = ("python", "torch", "megatron-core", "transformers")
    lines = {
        "Code": dict.fromkeys(state(origin["code"]) for origin in origins),
        "Versions": (f"{name} {versions[name]}" for name in packages),
        "Date": dict.fromkeys((days[0], days[-1])),
        "Machine": dict.fromkeys(place(one) for one in machines),
        "Load average": (f"{min(loads):g} to {max(loads):g} when runs began and ended",),
        "Niceness": sorted({str(one["nice"]) for one in machines}),
    }
    return "\n".join(f"* {name}: {', '.join(told)}" for name, told in lines.items())


def provenance(name: str, module: str, runs: Sequence[Run]) -> str:
    """Where the figures are from, and where they can be looked up."""
    return f"""{made_at([run.origin for run in runs], runs[0].summary["versions"])}

`docs/results/raw/{name}` holds of each run `origin.json` (command, commit, start, seconds, machine), `summary.json` and
`metrics.jsonl`; this page is made from them, again with `python -m benchmarks.{module} --redraw`."""
