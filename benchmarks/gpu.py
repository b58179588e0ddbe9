"""What a GPU makes of it: its own ceilings, updates, log-probs and rollouts, on models in the shape of Qwen3.

Run: python -m benchmarks.gpu [--json FILE] [--only SECTION ...]

Weights are random and in bf16. Every section is printed, and the file written, as soon as it is measured; one that
fails says why, and the next goes on. Named sections run in the order in which they are named; `profile`, where the time
of an update goes, runs only so. `--device cpu --tiny` goes through all of it on a CPU; its figures mean nothing.
"""

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_card import Card, about, ceilings
from benchmarks.gpu_kernels import log_probs, rollouts
from benchmarks.gpu_profile import profiled
from benchmarks.gpu_update import against_bare_loop, speed

Section = Callable[[], Any]
ON_REQUEST = "profile"
"""A section for whoever makes it faster, and no figure."""


def sections(card: Card, folder: Path, limits: dict[str, float]) -> dict[str, Section]:
    """By name, the quick ones first."""
    batches = (2, 3) if card.tiny else (8, 64, 256)
    pairs = [(batch, graphs) for batch in batches for graphs in ((False, True) if card.gpu else (False,))]
    return {
        "log_probs": lambda: log_probs(card, limits["copy_bytes_per_s"]),
        "update_qwen3_0_6b": lambda: speed(card, "qwen3_0_6b", folder, limits["bf16_flop_per_s"]),
        "rollout": lambda: [rollouts(card, batch, graphs=graphs) for batch, graphs in pairs],
        "bare_loop": lambda: against_bare_loop(card, folder),
        "update_qwen3_1_7b": lambda: speed(card, "qwen3_1_7b", folder, limits["bf16_flop_per_s"]),
        "profile": lambda: profiled(card, folder),
    }


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def show(name: str, found: Any, seconds: float) -> None:
    print(f"\n{name} ({seconds:.1f} s)", flush=True)
    for row in found if isinstance(found, list) else [found]:
        print("  " + "  ".join(f"{key}={shown(value)}" for key, value in row.items()), flush=True)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="*")
    settings = parser.parse_args(arguments)
    card = Card(torch.device(settings.device), settings.tiny)
    found: dict[str, Any] = {"card": about(card)}
    show("card", found["card"], 0.0)
    with tempfile.TemporaryDirectory() as name:
        limits = ceilings(card)
        known = {"ceilings": lambda: limits, **sections(card, Path(name), limits)}
        asked = settings.only or [title for title in known if title not in ("ceilings", ON_REQUEST)]
        if unknown := set(asked) - set(known):
            parser.error(f"no section {min(unknown)}: there are {', '.join(known)}")
        for title in ("ceilings", *asked):
            section = known[title]
            began = time.perf_counter()
            try:
                found[title] = section()
            except Exception as error:
                traceback.print_exc()
                found[title] = {"error": f"{type(error).__name__}: {error}"}
                card.forget()
            show(title, found[title], time.perf_counter() - began)
            if settings.json:
                settings.json.write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
