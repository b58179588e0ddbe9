"""Seconds of a step with rollout.mode=sync and one_step_off, in turns: `python -m benchmarks.overlap [overrides]`.

The demo with one training and one rollout worker on Ray, each on a core of its own, and groups so large that generation
and update take about as long.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.demo_runs import ROOT
from opd_trainer.rollout.config import RolloutMode
from opd_trainer.tracking.files import METRICS

STEPS, WARM_UP, ROUNDS = 25, 5, 2
ARGUMENTS = (
    "cluster=ray",
    "cluster.num_workers=1",
    "rollout.samples_per_prompt=16",
    "megatron.optimizer.lr=1e-3",
    f"steps={STEPS}",
    "eval.every=0",
    "eval.teacher=false",
    "eval.reverse_kl_prompts=0",
    "eval.datasets.heldout.n_rows=8",
    "checkpoint.every=0",
    "tracking.console=false",
)


def measure(mode: RolloutMode, directory: Path, overrides: list[str]) -> list[float]:
    """Seconds of each step after the first ones, and before the last, which has nothing to overlap with."""
    command = [sys.executable, "launch.py", *ARGUMENTS, *overrides, f"rollout.mode={mode}", f"output_dir={directory}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
    return [row["perf/step_time"] for row in rows[WARM_UP:-1]]


def main() -> None:
    """Prints median and shortest step of both modes."""
    found: dict[RolloutMode, list[float]] = {mode: [] for mode in RolloutMode}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS):
            for mode in RolloutMode:
                found[mode] += measure(mode, Path(folder) / f"{mode}-{turn}", sys.argv[1:])
    for mode, seconds in found.items():
        print(f"{mode}: median {statistics.median(seconds):.3f} s, shortest {min(seconds):.3f} s")
    sync, off = found[RolloutMode.sync], found[RolloutMode.one_step_off]
    print(
        f"speed-up: median {statistics.median(sync) / statistics.median(off):.2f}, shortest {min(sync) / min(off):.2f}"
    )


if __name__ == "__main__":
    main()
