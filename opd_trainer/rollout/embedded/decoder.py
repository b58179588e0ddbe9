"""The forward pass of a decoder, shared by prefill and decoding; who attends to what is the caller's.

N = tokens (of all rows, flat), H = hidden size, D = head dim. All functions run without gradient.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from opd_trainer.rollout.embedded.shape import DecoderShape, ExpertShape
from opd_trainer.rollout.embedded.weights import DecoderWeights, ExpertWeights, MlpWeights


class Attend(Protocol):
    """Core attention over a cache: takes the new keys and values of a layer in, and answers its queries."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[N, heads * D] for `query` [N, heads, D], `key` and `value` [N, KV heads, D]."""
        ...


def rotations(shape: DecoderShape, length: int, device: torch.device) -> Tensor:
    """Rotary factors scale * exp(i * position * frequency), c64[length, D / 2] (RoFormer, arXiv 2104.09864, eq. 34)."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), shape.inv_freq)
    return torch.polar(torch.full_like(angles, shape.rope_scale), angles).to(device)


def forward(weights: DecoderWeights, tokens: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
    """Hidden states [N, H] after the last layer, before the final norm.

    Args:
        weights: the model.
        tokens: i64[N].
        rotation: c64[N, D / 2], the rows of `rotations` at each token's position.
        attend: core attention.
    """
    hidden = F.embedding(tokens, weights.embedding)
    rotation = rotation.unsqueeze(1)
    for index in range(weights.shape.num_layers):
        hidden = _attention(weights, index, hidden, rotation, attend)
        hidden = _feed_forward(weights, index, hidden)
    return hidden


def logits(weights: DecoderWeights, hidden: Tensor) -> Tensor:
    """Next-token logits f32[N, vocab] of hidden states [N, H]."""
    return weights.head(rms_norm(hidden, weights.final_norm, weights.shape.norm_eps)).float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, statistics in fp32 (arXiv 1910.07467, eq. 4, with epsilon inside the root)."""
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], eps=eps).mul_(weight)
    # torch's rms_norm is a chain of six passes over x on a CPU; the vector norm reads it once (3x faster, measured).
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    return (x * inverse).to(x.dtype).mul_(weight)


def _attention(weights: DecoderWeights, index: int, hidden: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
    """`hidden` with the attention of a layer added."""
    shape, layer = weights.shape, weights.layers[index]
    x = rms_norm(hidden, layer.input_norm, shape.norm_eps)
    heads = layer.qkv(x).unflatten(-1, (-1, shape.head_dim))
    # Queries and keys share one norm and one rotation.
    mixed, value = heads.split([shape.num_heads + shape.num_kv_heads, shape.num_kv_heads], dim=1)
    if layer.qk_norm is not None:
        mixed = rms_norm(mixed, layer.qk_norm, shape.norm_eps)
    pairs = torch.view_as_complex(mixed.float().unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * rotation).flatten(-2).to(value.dtype)
    query, key = rotated.split([shape.num_heads, shape.num_kv_heads], dim=1)
    return layer.output.added(hidden, attend(index, query, key, value))


def _feed_forward(weights: DecoderWeights, index: int, hidden: Tensor) -> Tensor:
    """`hidden` with the SwiGLU of a layer, or its experts', added."""
    layer, experts = weights.layers[index], weights.shape.experts
    x = rms_norm(hidden, layer.mlp_norm, weights.shape.norm_eps)
    if isinstance(layer.feed_forward, MlpWeights):
        mlp = layer.feed_forward
        return mlp.down.added(hidden, _gated(x, mlp))
    assert experts is not None, "a layer has experts where the shape has"
    return _add_experts(hidden, x, layer.feed_forward, experts)


def _gated(x: Tensor, mlp: MlpWeights) -> Tensor:
    """The hidden layer [N, F] of a SwiGLU (arXiv 2002.05202, eq. 6)."""
    gate, up = mlp.gate_up(x).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _add_experts(hidden: Tensor, x: Tensor, weights: ExpertWeights, shape: ExpertShape) -> Tensor:
    """Adds in place what each token's experts make of it, in proportion to their probabilities (Qwen3's router)."""
    probabilities = weights.router(x).float().softmax(-1)
    share, chosen = probabilities.topk(shape.per_token, dim=-1)
    if shape.normalize:
        share /= share.sum(-1, keepdim=True)
    for index in chosen.unique().tolist():
        tokens, rank = (chosen == index).nonzero(as_tuple=True)
        expert = weights.experts[index]
        out = expert.down(_gated(x[tokens], expert))
        hidden.index_add_(0, tokens, out * share[tokens, rank, None].to(out.dtype))
    return hidden
