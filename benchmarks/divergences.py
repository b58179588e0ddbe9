"""The demo's distillation alone, with every divergence: table and curves (`make estimators`)."""

from collections.abc import Sequence

from benchmarks.demo_runs import Run, Variant, execute, made_at, plot, table, write
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


def page(runs: Sequence[Run]) -> str:
    """docs/results/divergences.md."""
    return f"""# Every divergence on the arithmetic demo, one seed

Made by `make estimators` at {made_at(runs)}. Distillation alone
(`estimator=none`); nothing is tuned per divergence. The reverse KL is that of sampled tokens in every row, whatever was
minimised.

![curves](divergences.png)

{table(runs)}
"""


def main() -> None:
    """Runs what is missing and writes the page."""
    runs = [execute(variant, SEED) for variant in variants()]
    write("divergences", page(runs), plot(runs, variants()))
    print(table(runs))


if __name__ == "__main__":
    main()
