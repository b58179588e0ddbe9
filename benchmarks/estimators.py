"""The demo with every estimator, with and without distillation: table and bars (`make results`)."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.demo_runs import ROOT, Run, Variant
from benchmarks.pages import DATASET, Page, commands, main, provenance, table

SEED = 0
SLOWER = "megatron.optimizer.lr=3e-4"
"""Without a teacher the demo's learning rate, which is tuned for distillation, makes policies collapse."""
DISTILLED, ALONE = "#3266ad", "#e08214"
ESTIMATORS = sorted(path.stem for path in (ROOT / "conf" / "estimator").glob("*.yaml"))


def variants() -> list[Variant]:
    """Every estimator with a teacher, and every one that learns anything without."""
    distilled = [
        Variant(f"{name}-opd", f"{name} with distillation", (f"estimator={name}",), DISTILLED) for name in ESTIMATORS
    ]
    alone = [
        Variant(f"{name}-alone", f"{name} alone", (f"estimator={name}", "opd=off", SLOWER), ALONE)
        for name in ESTIMATORS
        if name != "none"
    ]
    return distilled + alone


def bars(runs: Sequence[Run]) -> Figure:
    """Final held-out accuracy by estimator."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplots()
    for shift, colour, label in ((-0.2, DISTILLED, "with distillation"), (0.2, ALONE, "alone")):
        mine = {
            run.variant.overrides[0].removeprefix("estimator="): run for run in runs if run.variant.colour == colour
        }
        places = [place + shift for place, name in enumerate(ESTIMATORS) if name in mine]
        heights = [mine[name].summary["evaluation"]["after"][DATASET] for name in ESTIMATORS if name in mine]
        axes.bar(places, heights, width=0.38, color=colour, label=label)
        for place, height in zip(places, heights, strict=True):
            axes.text(place, height + 0.01, f"{height:.0%}", ha="center", fontsize=8)
    before = runs[0].summary["evaluation"]["before"][DATASET]
    axes.axhline(before, color="black", ls=":", lw=1.2, label=f"student before: {before:.0%}")
    axes.set_xticks(range(len(ESTIMATORS)), [name.replace("_plus_plus", "++").replace("_", " ") for name in ESTIMATORS])
    axes.tick_params(axis="x", labelrotation=20)
    axes.set_title("Held-out accuracy after the demo (greedy)", loc="left")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, fontsize=9)
    return figure


def text(runs: Sequence[Run]) -> str:
    """docs/results/estimators.md."""
    return f"""# Every estimator on the arithmetic demo, one seed

Made by `make results`. Nothing is tuned per estimator: batch and number of steps are the demo's; so is the
learning rate with distillation, and a tenth of it alone.

![accuracies](estimators.png)

{table(runs)}

{commands(PAGE.planned)}

{provenance(PAGE.name, "estimators", runs)}
"""


PAGE = Page("estimators", [(variant, SEED) for variant in variants()], text, bars)

if __name__ == "__main__":
    main(PAGE)
