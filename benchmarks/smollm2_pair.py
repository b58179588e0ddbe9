"""A real teacher, SmolLM2-135M-Instruct, and a student with something to win back: the same without six of its layers.

    python -m benchmarks.smollm2_pair OUT [--source HuggingFaceTB/SmolLM2-135M-Instruct]

writes OUT/teacher (30 layers, 135 M parameters, Llama architecture, Apache-2.0) and OUT/student (without layers 12 to
17: 24 layers, 113 M parameters, the same tokenizer). The source is a Hugging Face folder, or a name that can be
downloaded.
"""

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

DROPPED = range(12, 18)
"""In the middle, where a layer changes its input least."""


def drop_layers(model: Any, dropped: Collection[int]) -> None:
    """Removes decoder layers from a transformers model, and from its configuration."""
    kept = [index for index in range(len(model.model.layers)) if index not in dropped]
    model.model.layers = nn.ModuleList(model.model.layers[index] for index in kept)
    layer: Any
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]


def make_pair(source: str, out: Path, dropped: Collection[int] = DROPPED) -> None:
    """Writes the teacher and the student in bfloat16."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    for name in ("teacher", "student"):
        if name == "student":
            drop_layers(model, dropped)
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    make_pair(arguments.source, arguments.out)
    print(f"{arguments.out}/teacher and {arguments.out}/student are written")


if __name__ == "__main__":
    main()
