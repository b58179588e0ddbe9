"""A sweep of the demo over five coefficients and two seeds: table, curves and command into docs/results.

python -m benchmarks.sweep [--redraw]

It is an ordinary sweep: the same command goes on where it stopped. What is kept is a sweep directory, too.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.demo_runs import ORIGIN, RAW, RUNS, is_current, keep_run, launch, set_aside_if_stale
from benchmarks.pages import made_at, write
from opd_trainer.run_record import RUN_FILE
from opd_trainer.sweep.plot import draw
from opd_trainer.sweep.record import SWEEP_FILE
from opd_trainer.sweep.results import AVERAGED, Setting, read_settings
from opd_trainer.sweep.table import markdown

ARGUMENTS = ("-m", "opd_kl_coef=0.1,0.25,0.5,1.0,2.0", "seed=0,1", "eval.every=10")
DIRECTORY = RUNS / "sweep"
KEPT_SWEEP = RAW / "sweep"


def run() -> None:
    """Runs what is missing, and keeps it."""
    if not is_current(DIRECTORY / ORIGIN):
        set_aside_if_stale(DIRECTORY)
        launch(ARGUMENTS, DIRECTORY)
    KEPT_SWEEP.mkdir(parents=True, exist_ok=True)
    for name in (ORIGIN, SWEEP_FILE):
        shutil.copyfile(DIRECTORY / name, KEPT_SWEEP / name)
    for setting in read_settings(DIRECTORY):
        for outcome in setting.outcomes:
            source, target = (folder / outcome.trial.directory for folder in (DIRECTORY, KEPT_SWEEP))
            keep_run(source, target, AVERAGED.values())
            shutil.copyfile(source / RUN_FILE, target / RUN_FILE)


def configurations(settings: Sequence[Setting]) -> str:
    """Which configuration each trial had."""
    trials = [outcome.trial for setting in settings for outcome in setting.outcomes]
    return "\n".join(f"* `{trial.directory}`: `{trial.config_hash}`" for trial in trials)


def text(directory: Path) -> str:
    """docs/results/sweep.md."""
    settings = read_settings(directory)
    origin = json.loads((directory / ORIGIN).read_text(encoding="utf-8"))
    summary = settings[0].outcomes[0].summary
    assert summary is not None
    return f"""# A sweep of the arithmetic demo over the coefficient of distillation

Made by `python -m benchmarks.sweep`.

```
python launch.py {" ".join(ARGUMENTS)}
```

Mean ± standard error over two seeds; reward and length are means over the last tenth of the steps. Bands of the plot
reach from the lower to the higher of the two, reverse KL and reward are moving averages. Adam takes steps of about the
same length whatever the scale of the gradient, and the task reward agrees with the teacher here: over a factor of
twenty in the coefficient the accuracies differ by no more than 256 held-out problems can tell (one of them has a
sampling error of 1.2 points).

{markdown(settings)}
![curves](sweep.png)

Configuration of each trial:

{configurations(settings)}

{made_at([origin], summary["versions"])}

`docs/results/raw/sweep` holds the sweep, less what the page does not need: `origin.json` (command, commit, start,
seconds, machine), and of each trial `summary.json` and `metrics.jsonl`; this page is made from them, again with
`python -m benchmarks.sweep --redraw`.
"""


def main() -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redraw", action="store_true", help="make page and plot from docs/results/raw; run nothing")
    if not parser.parse_args().redraw:
        run()
    write("sweep", text(KEPT_SWEEP), draw(read_settings(KEPT_SWEEP), "demo"))


if __name__ == "__main__":
    main()
