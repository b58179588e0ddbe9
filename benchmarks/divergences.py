"""The demo's distillation alone, with every divergence: table and curves (`make results`)."""

from collections.abc import Sequence

from benchmarks.demo_runs import Run, Variant
from benchmarks.pages import Page, commands, main, plot, provenance, table
from opd_trainer.divergence.config import DivergenceKind

SEED = 0
COLOURS = ("#3266ad", "#1b9e77", "#e08214", "#7570b3", "#66a61e", "#e6ab02", "#d62f6d")


def variants() -> list[Variant]:
    """Without a task reward, so that the teacher alone moves the student; few candidates of a small vocabulary."""
    return [
        Variant(
            f"divergence-{kind}",
            kind.replace("_", " "),
            ("estimator=none", f"opd.divergence.kind={kind}", "opd.divergence.top_k=4", "opd.log_prob_top_k=4"),
            colour,
        )
        for kind, colour in zip(DivergenceKind, COLOURS, strict=True)
    ]


def text(runs: Sequence[Run]) -> str:
    """docs/results/divergences.md."""
    return f"""# Every divergence on the arithmetic demo, one seed

Made by `make results`. Distillation alone (`estimator=none`); nothing is tuned per divergence. The reverse KL is
that of sampled tokens in every row, whatever was minimised.

![curves](divergences.png)

{table(runs)}

{commands(PAGE.planned)}

{provenance(PAGE.name, "divergences", runs)}
"""


PAGE = Page(
    "divergences",
    [(variant, SEED) for variant in variants()],
    text,
    lambda runs: plot(runs, variants()),
)

if __name__ == "__main__":
    main(PAGE)
