"""The demo with three seeds and its control runs: table, curves and commands into docs/results (`make results`).

A finished run of the same code is not repeated, so that an interrupted `make results` goes on where it stopped.
"""

from collections.abc import Sequence

from benchmarks.demo_runs import Run, Variant
from benchmarks.pages import Page, commands, main, plot, provenance, table

SEEDS = (0, 1, 2)
VARIANTS = (
    Variant("opd", "GRPO with distillation", (), "#3266ad"),
    Variant("grpo", "GRPO alone", ("opd=off", "megatron.optimizer.lr=3e-4"), "#e08214"),
    Variant("grpo_fast", "GRPO alone, demo's learning rate", ("opd=off",), "#b2182b"),
    Variant("distillation", "distillation alone", ("estimator=none",), "#3a923a"),
    Variant(
        "self",
        "the teacher as its own student",
        ("estimator=none", "model.load=demo:teacher", "megatron.optimizer.weight_decay=0"),
        "#6b6b6b",
    ),
)


def text(runs: Sequence[Run]) -> str:
    """docs/results/arithmetic.md."""
    return f"""# The arithmetic demo, three seeds and its controls

Made by `make results`. Lines are means over the seeds, bands reach from the lowest to the highest. The reverse KL of
the table is measured on fixed held-out prompts, that of the plot on the training samples. The demo's learning rate is
tuned for distillation; GRPO alone falls apart at it, so it is shown at a tenth as well, where it learns.

![curves](arithmetic.png)

{table(runs)}

{commands(PAGE.planned)}

{provenance(PAGE.name, "results", runs)}
"""


PAGE = Page(
    "arithmetic",
    [(variant, seed) for variant in VARIANTS for seed in SEEDS],
    text,
    lambda runs: plot(runs, VARIANTS),
)

if __name__ == "__main__":
    main(PAGE)
