"""How a torch_dist checkpoint names a model's tensors: ours, Megatron-LM's and slime's, of several versions.

All are Megatron-core's GPTModel names. They differ in a prefix, in whether the layers of a model are one stacked tensor
or a tensor each, in whether gate and up are apart, and in the norms, which Transformer Engine keeps inside of the
linear layer behind them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_trainer.errors import CheckpointError, ShapeMismatch
from opd_trainer.megatron.families.base import Architecture

EMBEDDING = "embedding.word_embeddings.weight"
OPTIMIZER = "optimizer."
"""In the names of optimizer state; several optimizers, as mixtures of experts have them, may put a number before it."""

NORMS = (
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
)
"""What Transformer Engine calls a norm, and what it is called without."""


@dataclass(frozen=True, slots=True)
class Naming:
    """What the tensors of one checkpoint are called.

    Attributes:
        prefix: of every name.
        metadata: asks Megatron for the same names.
        shapes: of all tensors, by name.
    """

    prefix: str
    metadata: Mapping[str, bool]
    shapes: Mapping[str, tuple[int, ...]]

    def rename(self, state: dict[str, Any]) -> dict[str, Any]:
        """A sharded state, asked for with `prefix` and `metadata`, under the names that the checkpoint has."""
        for sharded in state.values():
            for pair in NORMS:
                for ours, theirs in (pair, pair[::-1]):
                    renamed = sharded.key.replace(ours, theirs)
                    if sharded.key not in self.shapes and renamed in self.shapes:
                        sharded.key = renamed
        return state


def naming_of(directory: Path, tensors: Mapping[str, Any], architecture: Architecture) -> Naming:
    """Finds out how a checkpoint names its tensors.

    Args:
        directory: of the checkpoint, for messages.
        tensors: what Megatron tells of its tensors, by name.
        architecture: of the model that is to be filled.

    Raises:
        CheckpointError: it holds no GPT model of Megatron-core.
        ShapeMismatch: its vocabulary is smaller than the model's.
    """
    shapes = {name: tuple(tensor.global_shape) for name, tensor in tensors.items() if OPTIMIZER not in name}
    embeddings = [name for name in shapes if name.endswith(EMBEDDING)]
    if not embeddings:
        raise CheckpointError(
            f"{directory}: has no tensor {EMBEDDING}: it is no GPT model of Megatron-core. "
            f"It has {', '.join(sorted(shapes)[:5]) or 'no tensors'}. Name a checkpoint of a language model"
        )
    embedding = min(embeddings, key=len)
    prefix = embedding.removesuffix(EMBEDDING)
    rows = shapes[embedding][0]
    if rows < architecture.vocab_size:
        raise ShapeMismatch(
            f"{directory}: its embedding has {rows} rows and config.json asks for {architecture.vocab_size}: "
            f"the last ones would keep random values. Check that both are of the same model"
        )
    metadata = {
        "non_homogeneous_layers": any(name.startswith(f"{prefix}decoder.layers.0.") for name in shapes),
        "singleton_local_shards": any(name.endswith("linear_fc1.weight_w") for name in shapes),
    }
    return Naming(prefix, metadata, shapes)
