"""The forward pass of a dense decoder, shared by prefill and decoding; who attends to what is the caller's.

B = rows, Q = new tokens of each row, H = hidden size, D = head dim. All functions run without gradient.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from opd_trainer.rollout.embedded.shape import DecoderShape
from opd_trainer.rollout.embedded.weights import DecoderWeights, LayerWeights


class Attend(Protocol):
    """Core attention over a cache: takes the new keys and values of a layer in, and answers its queries."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, Q, heads, D] for `query` [B, Q, heads, D], `key` and `value` [B, Q, KV heads, D]."""
        ...


def rotations(shape: DecoderShape, length: int, device: torch.device) -> Tensor:
    """Rotary factors scale * exp(i * position * frequency), c64[length, D / 2] (RoFormer, arXiv 2104.09864, eq. 34)."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), shape.inv_freq)
    return torch.polar(torch.full_like(angles, shape.rope_scale), angles).to(device)


def forward(weights: DecoderWeights, tokens: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
    """Hidden states [B, Q, H] after the last layer, before the final norm.

    Args:
        weights: the model.
        tokens: i64[B, Q].
        rotation: c64[B, Q, 1, D / 2], the rows of `rotations` at each token's position.
        attend: core attention.
    """
    hidden = F.embedding(tokens, weights.embedding)
    for index, layer in enumerate(weights.layers):
        hidden = hidden + _attention(weights, index, hidden, rotation, attend)
        hidden = hidden + _mlp(layer, rms_norm(hidden, layer.mlp_norm, weights.shape.norm_eps))
    return hidden


def logits(weights: DecoderWeights, hidden: Tensor) -> Tensor:
    """Next-token logits f32[B, vocab] of hidden states [B, H]."""
    return F.linear(rms_norm(hidden, weights.final_norm, weights.shape.norm_eps), weights.head).float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, statistics in fp32 (arXiv 1910.07467, eq. 4, with epsilon inside the root)."""
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    # torch's CPU rms_norm is a chain of six passes over x; the vector norm reads it once (3x faster, measured).
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    return (x * inverse).to(x.dtype).mul_(weight)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def _attention(weights: DecoderWeights, index: int, hidden: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
    shape, layer = weights.shape, weights.layers[index]
    x = rms_norm(hidden, layer.input_norm, shape.norm_eps)
    heads = F.linear(x, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, shape.head_dim))
    query, key, value = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=-2)
    if layer.q_norm is not None and layer.k_norm is not None:
        query = rms_norm(query, layer.q_norm, shape.norm_eps)
        key = rms_norm(key, layer.k_norm, shape.norm_eps)
    mixed = attend(index, _rotate(query, rotation), _rotate(key, rotation), value)
    return F.linear(mixed.flatten(-2), layer.output, layer.output_bias)


def _mlp(layer: LayerWeights, x: Tensor) -> Tensor:
    gate, up = F.linear(x, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
    return F.linear(F.silu(gate).mul_(up), layer.down, layer.down_bias)
