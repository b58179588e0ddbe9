"""The demo on real SGLang servers: table, curves and command into docs/results.

OPD_SGLANG_PYTHON=$(scripts/sglang_cpu/build.sh) python -m benchmarks.sglang_demo [--redraw]

The row without servers is that of `make results`.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.demo_runs import Run, Variant, overrides
from benchmarks.pages import Page, main, plot, provenance, table

PYTHON = "$OPD_SGLANG_PYTHON"
VARIANT = Variant(
    "sglang",
    "SGLang for both",
    (
        "rollout=sglang",
        "opd=sglang",
        "teacher=sglang_managed",
        f"rollout.launch.python={PYTHON}",
        "rollout.launch.dtype=float32",
        f"teacher.launch.python={PYTHON}",
        "teacher.launch.dtype=float32",
    ),
    "#d62f6d",
)
SEED = 0


def beside() -> Run:
    """The same run with the embedded engine and a resident teacher."""
    return next(run for run in results.PAGE.kept() if run.name == "opd-0")


def figure(runs: Sequence[Run]) -> Figure:
    """Curves with and without servers."""
    both = [beside(), *runs]
    return plot(both, [run.variant for run in both])


def text(runs: Sequence[Run]) -> str:
    """docs/results/sglang.md."""
    run = runs[0]
    checked = [(row["step"] + 1, row["eval/heldout/pass@1"]) for row in run.rows if "eval/heldout/pass@1" in row]
    lost = sum(row["rollout/dropped"] for row in run.rows)
    unscored = max(row["opd/masked_fraction"] for row in run.rows)
    gap = max(row["train/rollout_log_prob_diff"] for row in run.rows)
    first, *others = overrides(VARIANT, SEED)
    return f"""# The demo on real SGLang servers

The same run as `python launch.py`, with both engines outside: one SGLang server generates, another one scores, on a
CPU.

```
export OPD_SGLANG_PYTHON=$(scripts/sglang_cpu/build.sh)   # SGLang for a CPU; 3 GB, once
python launch.py {first} {others[0]} \\
    {" ".join(others[1:4])} \\
    {" ".join(others[4:6])} \\
    {" ".join(others[6:])}
```

{table([beside(), run])}

pass@1 on 256 held-out problems, one standard error is {run.summary["standard_error"]["after"]["heldout"]:.1%}; samples
differ between the two runs, as SGLang has no deterministic sampling on a CPU.

![curves](sglang.png)

| after step | {" | ".join(str(step) for step, _ in checked)} |
|---{"|---" * len(checked)}|
| pass@1 | {" | ".join(f"{score:.1%}" for _, score in checked)} |

Samples that were dropped: {lost:g}; the largest share of a step's tokens without a score of the teacher: {unscored:g}.
Log-probs of the server and of the trainer differed by {gap:.1e} nats per token on average at most (float32 on both
sides): new weights arrived in every step. Minutes say nothing about SGLang, which is made for GPUs.

Two defects showed only here, and are mended: SGLang tells the last id of its vocabulary as 0, which looked like an
answer about other tokens; and a connection that had been idle during an evaluation was closed by the server just as
weights were sent over it.

{provenance(PAGE.name, "sglang_demo", runs)}
"""


PAGE = Page("sglang", [(VARIANT, SEED)], text, figure, ("rollout/dropped", "opd/masked_fraction"))

if __name__ == "__main__":
    main(PAGE)
