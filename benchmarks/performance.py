"""What a step costs, against its floors: measures, and writes the table of docs/performance.md.

python -m benchmarks.performance                            the table, from docs/results/performance
python -m benchmarks.performance --measure [NAME ...]       measure these first, or all that need no models of yours
python -m benchmarks.performance --measure step_smollm2 -- OVERRIDE ...    with overrides that name models and data

A machine that does something else meanwhile spoils the figures; the load average stands beside them.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "results" / "performance"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- MEASURED -->", "<!-- /MEASURED -->"

MEASUREMENTS: dict[str, tuple[str, ...]] = {
    "step_demo": ("benchmarks.step_breakdown",),
    "rollout_demo": ("benchmarks.rollout",),
    "rollout_smollm": ("benchmarks.rollout", "--model", "smollm", "--dtype", "bfloat16"),
    "train_step": ("benchmarks.train_step",),
    "log_prob_memory": ("benchmarks.log_prob_memory",),
}
"""Name of a JSON -> the module and the arguments that write it."""
OF_YOURS: dict[str, tuple[str, ...]] = {"step_smollm2": ("benchmarks.step_breakdown",)}
"""The same, for models that the project does not bring."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A line of the table.

    Attributes:
        what: is measured.
        source: name of the JSON.
        read: the figure in it.
        limit: that the figure should not exceed, or not fall below.
        at_most: which of the two; None where there is no goal.
        form: of figure and limit.
        floor: what cannot be beaten, in words.
    """

    what: str
    source: str
    read: Callable[[Any], float]
    limit: float = 0.0
    at_most: bool | None = None
    form: str = ".1%"
    floor: str = ""

    @property
    def goal(self) -> str:
        """The limit in words."""
        return "-" if self.at_most is None else f"{'<=' if self.at_most else '>='} {self.limit:{self.form}}"

    def met(self, value: float) -> str:
        """Whether a figure is as it should be."""
        if self.at_most is None:
            return "-"
        return "yes" if (value <= self.limit if self.at_most else value >= self.limit) else "**no**"


def ratio(first: str, second: str, table: str = "fixed") -> Callable[[Any], float]:
    """Tokens per second of one contestant by those of another."""
    return lambda found: found[table][first] / found[table][second]


def steps(source: str, title: str) -> tuple[Goal, ...]:
    """What is asked of the steps of a run."""
    return (
        Goal(f"{title}: seconds of a step", source, lambda found: found["step_s"], form=".2f"),
        Goal(f"{title}: tokens per second", source, lambda found: found["tokens_per_s"], form=".0f"),
        Goal(f"{title}: rollout, of a step", source, lambda found: found["rollout"]),
        Goal(f"{title}: teacher, of a step", source, lambda found: found["teacher"]),
        Goal(f"{title}: update, of a step", source, lambda found: found["train"]),
        Goal(f"{title}: weight sync, of a step", source, lambda found: found["sync"], 0.02, True, floor="0"),
        Goal(f"{title}: all else, of a step", source, lambda found: found["controller"], 0.05, True, floor="0"),
        Goal(f"{title}: seconds to the first rollout", source, lambda found: found["start_s"], 15, True, ".1f"),
    )


LINES = (
    *steps("step_demo", "demo"),
    *steps("step_smollm2", "SmolLM2 pair"),
    Goal("engine / bare loop, demo's shape", "rollout_demo", ratio("engine", "bare loop"), 0.8, False, ".2f", "1"),
    Goal("engine / bare loop, SmolLM's shape", "rollout_smollm", ratio("engine", "bare loop"), 0.8, False, ".2f", "1"),
    Goal("engine / transformers' `generate`, demo's shape", "rollout_demo", ratio("engine", "generate"), form=".2f"),
    Goal(
        "the same, responses that end by themselves",
        "rollout_demo",
        ratio("engine", "generate", "free"),
        form=".2f",
    ),
    Goal("engine / `generate`, SmolLM's shape", "rollout_smollm", ratio("engine", "generate"), form=".2f"),
    Goal(
        "update / bare loop, speed",
        "train_step",
        lambda found: found["bare_loop"]["speed_of_bare_loop"],
        0.95,
        False,
        ".3f",
        "1",
    ),
    Goal(
        "update with / without a teacher of equal size, time",
        "train_step",
        lambda found: found["teacher"]["cost_of_teacher"],
        1.4,
        True,
        ".3f",
        "1.33",
    ),
    Goal(
        "tokens / room in packed micro-batches, 8 ranks",
        "train_step",
        lambda found: next(one["fill"] for one in found["packing"] if one["ranks"] == 8),
        form=".3f",
    ),
    Goal(
        "busiest rank's share, 8 ranks",
        "train_step",
        lambda found: next(one["efficiency"] for one in found["packing"] if one["ranks"] == 8),
        0.95,
        False,
        ".3f",
        "1",
    ),
    Goal(
        "two processes against one, speed",
        "train_step",
        lambda found: found["two_processes"]["speedup"],
        form=".2f",
        floor="2",
    ),
    Goal(
        "memory of log-probs / naive fp32, forward",
        "log_prob_memory",
        lambda found: found[0]["forward_ratio"],
        0.25,
        True,
    ),
    Goal("the same with gradient", "log_prob_memory", lambda found: found[0]["ratio"], 0.25, True),
)


def read(name: str) -> dict[str, Any] | None:
    """A measurement, None where it was not made."""
    file = FIGURES / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def row(line: Goal, found: dict[str, Any] | None) -> str:
    """A line of the table."""
    if found is None:
        cells = [line.what, "not measured", line.goal, "-"]
    else:
        value = line.read(found["figures"])
        cells = [line.what, f"{value:{line.form}}", line.goal, line.met(value)]
    return f"| {' | '.join([*cells, line.floor or '-', f'`{line.source}`'])} |"


def where(name: str, found: dict[str, Any]) -> str:
    """Where and how a measurement was made."""
    one, code = found["machine"], found["code"]
    commit = "an unknown commit" if code is None else f"commit {code['commit'][:12]}{' with changes' * code['changed']}"
    return (
        f"| `{name}` | `{found['command']}` | {found['start'][:10]} | {commit} | {one['cores']} cores of "
        f"{one['processor']}, {one['memory_gib']} GiB | {' to '.join(f'{load:g}' for load in one['load_average'])} |"
    )


def table() -> str:
    """Both tables: the figures, and where they are from."""
    measured = {name: read(name) for name in (*MEASUREMENTS, *OF_YOURS)}
    lines = [
        "| what | measured | goal | met | floor | from |",
        "|---|---|---|---|---|---|",
        *(row(line, measured[line.source]) for line in LINES),
        "",
        "| figures | command | date | code | machine | load average before and after |",
        "|---|---|---|---|---|---|",
        *(where(name, found) for name, found in measured.items() if found is not None),
    ]
    return "\n".join(lines)


def measure(names: Sequence[str], overrides: Sequence[str]) -> None:
    """Runs benchmarks, one after another."""
    for name in names:
        module, *arguments = {**MEASUREMENTS, **OF_YOURS}[name]
        target = (FIGURES / f"{name}.json").relative_to(ROOT)
        mine = overrides if name in OF_YOURS else ()
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", module, *arguments, "--json", str(target), *mine]
        subprocess.run(command, cwd=ROOT, check=True)


def page() -> str:
    """docs/performance.md with the tables of now."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(f"{BEGIN}\n")
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Measures what is asked for, and writes the page."""
    known = [*MEASUREMENTS, *OF_YOURS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="*", choices=known, default=None, metavar="NAME", help=", ".join(known))
    parser.add_argument("overrides", nargs="*", help="of step_smollm2: models and data")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        measure(arguments.measure or list(MEASUREMENTS), arguments.overrides)
    PAGE.write_text(page(), encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
