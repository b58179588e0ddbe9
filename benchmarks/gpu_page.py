"""docs/results/gpu.md, made from docs/results/gpu.json: what `python -m benchmarks.gpu --json FILE` wrote.

python -m benchmarks.gpu_page                 the page again
python -m benchmarks.gpu_page --take FILE     keep this run instead, and make the page
python -m benchmarks.gpu_page --add FILE      the same, but keep what this run did not measure
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
KEPT, PAGE = RESULTS / "gpu.json", RESULTS / "gpu.md"
SECTIONS = ("ceilings", "log_probs", "update_qwen3_0_6b", "rollout", "bare_loop", "update_qwen3_1_7b")
MODELS = {"update_qwen3_0_6b": "Qwen3-0.6B", "update_qwen3_1_7b": "Qwen3-1.7B"}
WAYS = {"off": "no teacher", "on": "a teacher of equal size beside it", "reverse_kl": "the same, whole distributions"}
PACKAGES = ("python", "torch", "megatron-core", "transformers")
COSTLIEST = 8
FAR = 1.25
WEIGHTS, CACHE = 2 * 596_049_920, 2 * 2 * 28 * 8 * 128
"""Bytes of Qwen3-0.6B in bf16: of its weights, and of the keys and values of a token."""
READ_BACK = 256
"""Tokens that a row has behind it on average: prompts of 128, half of responses of 256."""

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """A figure beside the best that is possible.

    Attributes:
        what: is measured.
        value: of it.
        best: that it could be.
        more_is_better: or less.
        form: of both.
    """

    what: str
    value: float
    best: float
    more_is_better: bool = False
    form: str = ".2f"

    @property
    def distance(self) -> float:
        """Times that the figure is worse than the best."""
        return self.best / self.value if self.more_is_better else self.value / self.best

    def __str__(self) -> str:
        distance = f"{self.distance:.2f}"
        shown = f"**{distance}**" if self.distance > FAR else distance
        return f"| {self.what} | {self.value:{self.form}} | {self.best:{self.form}} | {shown} |"


def has(found: Found, section: str) -> bool:
    """Whether a section was measured, to its end."""
    return section in found and "error" not in found[section]


def ours(found: Found) -> Found:
    """Of the ways to compute log-probs, that of this project on a GPU."""
    return next(row for row in found["log_probs"] if row["way"] != "log_softmax")


def decoding(found: Found, row: Found) -> float:
    """Tokens per second if every step only read weights, and the keys and values of all rows, at the rate of a copy."""
    moved = WEIGHTS + CACHE * READ_BACK * row["batch"]
    return row["batch"] * found["ceilings"]["copy_bytes_per_s"] / moved


def lines(found: Found) -> list[Line]:
    """Every figure that has a floor."""
    known = []
    for section in filter(lambda name: has(found, name), MODELS):
        update, model = found[section], MODELS[section]
        known += [
            Line(f"{model}: update, of the rate of a bf16 product (MFU)", update["off_mfu"], 1.0, True, ".1%"),
            Line(f"{model}: the same with a teacher, its forward pass counted", update["on_mfu"], 1.0, True, ".1%"),
            Line(f"{model}: time of an update with / without a teacher", update["cost_of_teacher"], 4 / 3),
            Line(
                f"{model}: time of an update with whole distributions / sampled tokens",
                update["reverse_kl_to_sampled"],
                1.0,
            ),
        ]
    if has(found, "log_probs"):
        row = ours(found)
        known += [
            Line("log-probs, time / one pass over the logits", row["forward_to_floor"], 1.0),
            Line("the same with the gradient, time / three passes", row["both_to_floor"], 1.0),
        ]
    if has(found, "bare_loop"):
        speed = found["bare_loop"]["speed_of_bare_loop"]
        known.append(Line("update / bare loop over the same model, speed", speed, 1.0, True))
    if has(found, "rollout"):
        known += [
            Line(
                f"tokens per second, {row['batch']} rows{'' if row['graphs'] else ', without CUDA graphs'}",
                row["tokens_per_s"],
                decoding(found, row),
                True,
                ",.0f",
            )
            for row in found["rollout"]
        ]
    return known


def rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join([f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)])


def updates(found: Found, section: str) -> str:
    """Where an update's time goes."""
    update = found[section]
    body = [
        [
            title,
            f"{update[f'{way}_tokens_per_s']:,.0f}",
            *(f"{update[f'{way}_{part}']:.3f}" for part in ("s", "teacher_s", "forward_backward_s", "optimizer_s")),
            f"{update[f'{way}_peak_gib']:.1f}",
        ]
        for way, title in WAYS.items()
    ]
    head = ("loss", "tokens/s", "seconds", "teacher", "forward and backward", "optimizer", "peak, GiB")
    return (
        f"An update of {MODELS[section]}'s shape: {update['parameters'] / 1e6:,.0f} million parameters, "
        f"{update['tokens']:,} tokens in {update['micro_batches']} micro-batches.\n\n{rows(head, body)}"
    )


def log_probs(found: Found) -> str:
    """Ways to compute log-probs."""
    body = [
        [
            row["way"],
            *(
                f"{row[f'{kind}_{what}']:.2f}"
                for kind in ("forward", "both")
                for what in ("ms", "to_floor", "peak_gib")
            ),
            f"{row['error']:.1g}",
        ]
        for row in found["log_probs"]
    ]
    parts = ("ms", "/ floor", "GiB beyond the logits")
    head = ("way", *(f"{kind}, {what}" for kind in ("forward", "with gradient") for what in parts), "largest error")
    kernel = any(row["way"] == "ours" for row in found["log_probs"])
    taken = (
        "`ours` is the kernel that a run on a GPU takes, `chunks` what a run elsewhere takes."
        if kernel
        else ("A run of this code took the smallest `chunks`; there was no kernel yet.")
    )
    return f"Log-probs of 4,096 tokens, vocabulary of 151,936, bf16 logits.\n{taken}\n\n{rows(head, body)}"


def rollout(found: Found) -> str:
    """The embedded engine."""
    eager = {row["batch"]: row["tokens_per_s"] for row in found["rollout"] if not row["graphs"]}
    body = [
        [
            str(row["batch"]),
            "yes" if row["graphs"] else "no",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / eager[row['batch']]:.2f}" if row["graphs"] and row["batch"] in eager else "-",
            f"{row['first_s']:.2f}",
        ]
        for row in found["rollout"]
    ]
    head = ("rows at once", "CUDA graphs", "tokens/s", "/ without graphs", "first batch, seconds")
    return (
        "The embedded engine on Qwen3-0.6B's shape: prompts of 128 tokens, responses of 256.\n"
        f"With graphs the second batch counts; the first, in the last column, captures them.\n\n{rows(head, body)}"
    )


def profiled(found: Found) -> str:
    """Where the time of an update goes."""
    told = found["profile"]
    body = []
    for of in ("teacher", "update"):
        total, counted = (next(row for row in told if (row["of"], row["by"]) == (of, by)) for by in ("total", "sum"))
        figures = (f"{counted['device_ms'] / 1e3:.3f}", f"{counted['kernels']:,}", f"{counted['operations']:,}")
        body.append([of, f"{total['s']:.3f}", *figures, f"{total['collections_s']:.3f}"])
    head = ("of", "seconds", "of these on the device", "kernels", "operations", "seconds of collecting garbage")
    kernels = [row for row in told if (row["of"], row["by"]) == ("update", "device")][:COSTLIEST]
    costliest = [[f"`{row['name']}`".replace("|", "/"), f"{row['calls']:,}", f"{row['ms']:.1f}"] for row in kernels]
    listed = f"\n\n{rows(('kernel', 'calls', 'ms'), costliest)}" if costliest else ""
    return (
        "Where the time of an update goes, with a teacher beside it, and of the teacher's scores alone. Seconds are "
        f"without a profiler, counts of one call under it.\n\n{rows(head, body)}{listed}"
    )


def missing(found: Found) -> str:
    """What this run has no figures of."""
    told = [
        f"* `{name}`: " + (f"failed, {found[name]['error']}" if name in found else "not measured in this run")
        for name in SECTIONS
        if not has(found, name)
    ]
    return "\n".join(told)


def provenance(found: Found) -> str:
    """Where the figures are from."""
    card = found["card"]
    versions = card.get("versions", {"torch": card["torch"]})
    told = {
        "Date": card.get("date", "not recorded"),
        "Machine": f"one {card['name']}, {card['memory_gib']} GiB, compute capability {card['capability']}",
        "Code": f"commit {card['commit'][:12]}" if card.get("commit") else "an unknown commit",
        "Versions": ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions)
        + f", CUDA {card['cuda']}"
        + (", without Transformer Engine" if "transformer-engine" not in versions else ""),
    }
    for section, run in found.get("earlier", {}).items():
        told[f"From an earlier run, `{section}`"] = f"{run['date']}, commit {run['commit'][:12]}"
    return "\n".join(f"* {name}: {what}" for name, what in told.items())


def text(found: Found) -> str:
    """docs/results/gpu.md."""
    limits = found["ceilings"]
    tables = [updates(found, name) for name in MODELS if has(found, name)]
    others = {"profile": profiled, "log_probs": log_probs, "rollout": rollout}
    tables += [table(found) for name, table in others.items() if has(found, name)]
    head = "| what | measured | at best | times worse |\n|---|---|---|---|"
    without = missing(found)
    return f"""# What a GPU makes of it

Random weights in bf16 in the shape of Qwen3 models, one GPU, one process; nothing is learned here.

{provenance(found)}

The card's own ceilings, measured in the same run: {limits["bf16_flop_per_s"] / 1e12:.0f} TFLOP/s for a product of
8,192 by 8,192 in bf16, {limits["fp32_flop_per_s"] / 1e12:.0f} in fp32, and {limits["copy_bytes_per_s"] / 1e12:.2f} TB/s
for a copy, read and write together.

## How far from the floor

{head}
{chr(10).join(map(str, lines(found)))}

In bold: more than {FAR} times worse than the best. Updates of small models wait for the host, which launches tens of
thousands of kernels: two measurements of the same update differed by a third, and a ratio can come out below its best.
What is at best:

* An update that does nothing but its products, at the rate of one large product (three with every weight that a token
  meets, causal attention, the output head on response tokens only). A teacher of equal size adds a forward pass to a
  forward and a backward: 4/3. The bare loop runs the same model by hand: where it is no faster, the time goes into the
  model's own kernels.
* A divergence of whole distributions that costs no more than log-probs of sampled tokens; it cannot, quite.
* Log-probs that read the logits once, or with the gradient twice and write it once.
* Decoding that reads weights, keys and values once a step, and nothing else.

## In detail

{(chr(10) * 2).join(tables)}
{f"{chr(10)}## Without figures{chr(10)}{chr(10)}{without}{chr(10)}" if without else ""}
```
python -m benchmarks.gpu --json FILE
python -m benchmarks.gpu_page --take FILE
```

[gpu.json](gpu.json) has all figures.
"""


def together(kept: Found, new: Found) -> Found:
    """A run with those sections of an earlier one that it lacks, and with where they are from.

    Raises:
        ValueError: the two ran on different cards.
    """
    if kept["card"]["name"] != new["card"]["name"]:
        raise ValueError(f"{kept['card']['name']} and {new['card']['name']} cannot be put into one table")
    missed = {name: kept[name] for name in SECTIONS if has(kept, name) and not has(new, name)}
    run = {"date": kept["card"].get("date", "not recorded"), "commit": kept["card"].get("commit") or "unknown"}
    earlier = {name: kept.get("earlier", {}).get(name, run) for name in missed}
    return {**new, **missed, **({"earlier": earlier} if earlier else {})}


def main(arguments: list[str] | None = None) -> None:
    """Keeps a run, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--take", type=Path, metavar="FILE", help="the figures of a run")
    which.add_argument("--add", type=Path, metavar="FILE", help="those of a run that measured a part")
    for name in ("date", "commit"):
        parser.add_argument(f"--{name}", help="of a run whose file does not tell it")
    settings = parser.parse_args(arguments)
    found = json.loads((settings.take or settings.add or KEPT).read_text(encoding="utf-8"))
    told = {name: getattr(settings, name) for name in ("date", "commit") if getattr(settings, name)}
    found["card"] = {**told, **{name: value for name, value in found["card"].items() if value is not None}}
    if settings.add:
        found = together(json.loads(KEPT.read_text(encoding="utf-8")), found)
    KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(text(found), encoding="utf-8")
    print(f"written: {PAGE.name}, {KEPT.name}")


if __name__ == "__main__":
    main()
