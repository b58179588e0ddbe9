"""Floating-point operations of a model's passes, as model FLOP utilisation counts them, and what a device could do.

Counted are two for each weight that a token meets and causal attention; padding, and activations that the backward pass
computes anew, are not.
"""

from collections.abc import Mapping
from functools import cache

import torch

from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.families.base import Architecture
from opd_trainer.megatron.memory import local_size

TRAINING = 3
"""Passes that a forward pass with its backward pass costs."""

PEAK_FLOP_PER_S: Mapping[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
}
"""Of dense products in bf16, by their data sheets. Whole names: a slice of a GPU has a name of its own."""


def peak_flop_per_s(device: torch.device, dtype: torch.dtype) -> float | None:
    """What a device could do at best with weights of `dtype`; None where that is not known."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return None
    return PEAK_FLOP_PER_S.get(torch.cuda.get_device_name(device))


def forward_flop(architecture: Architecture, tokens: int, pairs: int, positions: int) -> int:
    """Of a forward pass over whole sequences.

    Args:
        architecture: of the model.
        tokens: of all sequences.
        pairs: of a token and one that it attends to, itself included; n (n + 1) / 2 for a sequence of n tokens.
        positions: that the output head runs on.
    """
    body, head = _met(architecture)
    attention = 4 * architecture.num_layers * architecture.num_heads * architecture.head_dim * pairs
    return 2 * (body * tokens + head * positions) + attention


@cache
def _met(architecture: Architecture) -> tuple[int, int]:
    """Weights that a token meets on its way to the output head, and those of the head."""
    size, experts = local_size(architecture, MegatronConfig()), architecture.experts
    embedding = architecture.vocab_size * architecture.hidden_size
    head = architecture.hidden_size if architecture.value_head else embedding
    body = size.dense - embedding - (0 if architecture.tie_embeddings else head)
    return body + (0 if experts is None else size.experts * experts.per_token // experts.count), head
