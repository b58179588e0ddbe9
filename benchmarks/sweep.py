"""Sweeps of the demo, each with table, curves and command in docs/results.

python -m benchmarks.sweep [NAME ...] [--redraw]

They are ordinary sweeps: the same command goes on where it stopped. What is kept is a sweep directory, too.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.demo_runs import ORIGIN, RAW, RUNS, is_current, keep_run, launch, set_aside_if_stale
from benchmarks.pages import made_at, write
from opd_trainer.run_record import RUN_FILE
from opd_trainer.sweep.plot import draw
from opd_trainer.sweep.record import SWEEP_FILE
from opd_trainer.sweep.results import AVERAGED, Setting, read_settings
from opd_trainer.sweep.table import markdown


@dataclass(frozen=True, slots=True)
class DemoSweep:
    """A sweep of the demo and its page.

    Attributes:
        name: of the page and of its folders.
        title: of the page.
        arguments: of `launch.py`.
        about: a paragraph on what the table shows.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    about: str

    @property
    def kept(self) -> Path:
        """What is kept of it."""
        return RAW / self.name

    def run(self) -> None:
        """Runs what is missing, and keeps it."""
        directory = RUNS / self.name
        if not is_current(directory / ORIGIN):
            set_aside_if_stale(directory)
            launch(self.arguments, directory)
        self.kept.mkdir(parents=True, exist_ok=True)
        for name in (ORIGIN, SWEEP_FILE):
            shutil.copyfile(directory / name, self.kept / name)
        for setting in read_settings(directory):
            for outcome in setting.outcomes:
                source, target = (folder / outcome.trial.directory for folder in (directory, self.kept))
                keep_run(source, target, AVERAGED.values())
                shutil.copyfile(source / RUN_FILE, target / RUN_FILE)

    def text(self) -> str:
        """docs/results/<name>.md."""
        settings = read_settings(self.kept)
        origin = json.loads((self.kept / ORIGIN).read_text(encoding="utf-8"))
        summary = settings[0].outcomes[0].summary
        assert summary is not None
        return f"""# {self.title}

Made by `python -m benchmarks.sweep {self.name}`.

```
python launch.py {" ".join(self.arguments)}
```

{self.about}

{markdown(settings)}
![curves]({self.name}.png)

Mean ± standard error over the seeds; reward and length are means over the last tenth of the steps. Bands of the plot
reach from the lowest to the highest seed, reverse KL and reward are moving averages.

Configuration of each trial:

{configurations(settings)}

{made_at([origin], summary["versions"])}

`docs/results/raw/{self.name}` holds the sweep, less what the page does not need: `origin.json` (command, commit, start,
seconds, machine), and of each trial `summary.json` and `metrics.jsonl`; this page is made from them, again with
`python -m benchmarks.sweep {self.name} --redraw`.
"""


COEFFICIENTS = DemoSweep(
    "sweep",
    "A sweep of the arithmetic demo over the coefficient of distillation",
    ("-m", "opd_kl_coef=0.1,0.25,0.5,1.0,2.0", "seed=0,1", "eval.every=10"),
    """Adam takes steps of about the same length whatever the scale of the gradient, and the task reward agrees with the
teacher here: over a factor of twenty in the coefficient the accuracies differ by no more than 256 held-out problems can
tell (one of them has a sampling error of about a point).""",
)
MODES = DemoSweep(
    "one_step_off",
    "The arithmetic demo with rollouts one step off",
    ("-m", "rollout.mode=sync,one_step_off", "seed=0,1,2", "megatron.optimizer.lr=1e-3", "eval.every=20"),
    """At a learning rate that bears the delay. What the mode is for is told in
[one_step_off.md](../one_step_off.md).""",
)
SWEEPS = {sweep.name: sweep for sweep in (COEFFICIENTS, MODES)}


def configurations(settings: Sequence[Setting]) -> str:
    """Which configuration each trial had."""
    trials = [outcome.trial for setting in settings for outcome in setting.outcomes]
    return "\n".join(f"* `{trial.directory}`: `{trial.config_hash}`" for trial in trials)


def main() -> None:
    """Runs what is missing and writes the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"among {', '.join(SWEEPS)}; all of them without one")
    parser.add_argument("--redraw", action="store_true", help="make page and plot from docs/results/raw; run nothing")
    options = parser.parse_args()
    if unknown := set(options.names).difference(SWEEPS):
        parser.error(f"no sweep is called {', '.join(sorted(unknown))}: choose from {', '.join(SWEEPS)}")
    for sweep in map(SWEEPS.__getitem__, options.names or SWEEPS):
        if not options.redraw:
            sweep.run()
        write(sweep.name, sweep.text(), draw(read_settings(sweep.kept), "demo"))


if __name__ == "__main__":
    main()
