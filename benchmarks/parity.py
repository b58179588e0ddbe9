"""The same update in every parallel layout: largest absolute differences from one process, as a table.

A student learns from a resident teacher (OPD on, sequence ratios, entropy bonus): tiny Qwen3 and Qwen3-MoE models in
fp32, one gradient step on several micro-batches. Processes talk over gloo.

Run: python -m benchmarks.parity
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.megatron import parity
from tests.megatron.parity import Difference, Layout


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = parity.outcomes(Path(folder), parity.LAYOUTS)
    rows = [
        (layout, parity.difference(found[parity.alone(layout).name], found[layout.name])) for layout in parity.LAYOUTS
    ]
    print(table(rows))


def table(rows: Sequence[tuple[Layout, Difference]]) -> str:
    """Markdown: a line for each layout that is not the one it is compared with."""
    lines = [
        "| layout | processes | loss | log-probs | entropy | teacher | gradient (of its largest entry) |",
        "|---|---|---|---|---|---|---|",
    ]
    for layout, apart in rows:
        if layout is parity.alone(layout):
            continue
        columns = (apart.loss, apart.log_probs, apart.entropy, apart.teacher, apart.gradient)
        lines.append(
            f"| {layout.name} | {layout.world_size} | " + " | ".join(f"{value:.1e}" for value in columns) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
