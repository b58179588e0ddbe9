"""Where the time of a step goes: shares of the phases, what the controller adds, and how long a run takes to start.

Run: python -m benchmarks.step_breakdown [--json FILE] [OVERRIDE ...]

Runs `launch.py` with the overrides (the demo without any). Shares are of the median step, the first two left out.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import measuring
from opd_trainer.tracking.files import METRICS, read_rows

ROOT = Path(__file__).resolve().parents[1]
QUIET = (
    "tracking.console=false",
    "eval.every=0",
    "eval.n_prompts=2",
    "eval.teacher=false",
    "eval.reverse_kl_prompts=0",
    "eval.reference_key=null",
)
"""Next to nothing but the steps."""
PHASES = ("rollout", "teacher", "train", "sync")
WARM_UP = 2
POLL_S = 0.02


def run(overrides: Sequence[str], directory: Path) -> tuple[list[dict[str, Any]], float]:
    """The steps of a run, and the seconds from its launch to its first step, evaluation of two prompts included."""
    command = [sys.executable, "launch.py", *QUIET, *overrides, f"output_dir={directory}"]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        path, first = directory / METRICS, None
        while process.poll() is None:
            if first is None and path.exists() and path.stat().st_size:
                first = time.perf_counter() - began
            time.sleep(POLL_S)
    if process.returncode or first is None:
        raise SystemExit(f"the run failed with exit code {process.returncode}")
    rows = read_rows(path)
    return rows, first - rows[0]["perf/step_time"]


def breakdown(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median seconds of a step and of its phases, and the shares of the phases and of all that is none of them."""
    # The last step has an evaluation in it.
    late = rows[WARM_UP:-1]
    shares = {
        phase: statistics.median(row.get(f"perf/{phase}_time", 0.0) / row["perf/step_time"] for row in late)
        for phase in PHASES
    }
    spent = [sum(row.get(f"perf/{phase}_time", 0.0) for phase in PHASES) / row["perf/step_time"] for row in late]
    return {
        "step_s": statistics.median(row["perf/step_time"] for row in late),
        **shares,
        "controller": statistics.median(1 - share for share in spent),
        "tokens_per_s": statistics.median(row["perf/tokens_per_s"] for row in late),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    write = measuring()
    with tempfile.TemporaryDirectory() as folder:
        rows, start_s = run(arguments.overrides, Path(folder) / "run")
    found = {"start_s": start_s, **breakdown(rows)}
    for name, value in found.items():
        print(f"{name:<14}{value:.3f}")
    if arguments.json:
        write(arguments.json, found)


if __name__ == "__main__":
    main()
