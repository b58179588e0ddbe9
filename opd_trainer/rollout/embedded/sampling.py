"""Drawing the next token: one uniform per token, turned into a token by the inverse of the distribution function.

n = rows, V = vocabulary. A token depends on its row's logits and uniform only, so it cannot depend on who else is in
the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from opd_trainer.types import Sampling

_BLOCK = 512
"""Tokens of a block in the two-level search of a large vocabulary."""


def uniforms(seeds: list[int], count: int) -> Tensor:
    """f64[len(seeds), count] in [0, 1): the randomness of each request, from its own seed."""
    generator = torch.Generator()
    rows = torch.empty(len(seeds), count, dtype=torch.float64)
    for row, seed in zip(rows, seeds, strict=True):
        generator.manual_seed(seed)
        torch.rand(count, dtype=torch.float64, generator=generator, out=row)
    return rows


@dataclass(frozen=True, slots=True)
class Drawn:
    """Next tokens of n rows.

    Attributes:
        tokens: i64[n].
        log_probs: f32[n] under the full softmax at the sampling temperature (1 when greedy), before top-k and top-p;
            NaN where the row's logits are not finite.
        topk_ids: i64[n, k], the likeliest tokens, likeliest first; k is `Sampling.log_prob_top_k`.
        topk_log_probs: f32[n, k] under the same distribution.
    """

    tokens: Tensor
    log_probs: Tensor
    topk_ids: Tensor
    topk_log_probs: Tensor


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Drawn:
    """Draws the next tokens.

    Args:
        logits: f32[n, V]; overwritten.
        sampling: temperature, top_k, top_p (top-k first, then top-p on what it left), log_prob_top_k.
        uniform: f64[n] in [0, 1).
    """
    if sampling.temperature not in (0.0, 1.0):
        logits /= sampling.temperature
    logits -= logits.amax(-1, keepdim=True)
    mass = logits.exp()
    if sampling.temperature == 0.0:
        token = logits.argmax(-1, keepdim=True)
    elif sampling.top_k == 0 and sampling.top_p >= 1.0:
        token = _inverse(mass, uniform)
    else:
        likeliest, order = _truncate(mass, sampling)
        token = order.gather(-1, _inverse(likeliest, uniform))
    log_total = mass.sum(-1, keepdim=True).log_()
    likeliest, ids = logits.topk(sampling.log_prob_top_k, dim=-1)
    return Drawn(
        tokens=token.squeeze(-1),
        log_probs=(logits.gather(-1, token) - log_total).squeeze(-1),
        topk_ids=ids,
        topk_log_probs=likeliest - log_total,
    )


def _inverse(mass: Tensor, uniform: Tensor) -> Tensor:
    """The first index [n, 1] at which the running sum of `mass` [n, V] exceeds `uniform` times its total."""
    size = mass.shape[-1]
    if size <= _BLOCK:
        return _search(mass, uniform)[0]
    # First the block, then the token in it: a running sum over a large vocabulary is slow.
    blocks = F.pad(mass, (0, -size % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    block, rest = _search(blocks.sum(-1), uniform)
    within, _ = _search(blocks.take_along_dim(block.unsqueeze(-1), dim=1).squeeze(1), rest)
    return (block * _BLOCK + within).clamp_(max=size - 1)


def _search(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The index [n, 1] that `uniform` falls on, and how far into it, f64[n] in [0, 1)."""
    # float64: in float32 the running sum would lose the tail.
    running = mass.cumsum(-1, dtype=torch.float64)
    target = uniform.unsqueeze(-1) * running[:, -1:]
    index = torch.searchsorted(running, target, right=True).clamp_(max=mass.shape[-1] - 1)
    upper = running.gather(-1, index)
    lower = torch.where(index > 0, running.gather(-1, (index - 1).clamp_(min=0)), 0.0)
    return index, ((target - lower) / (upper - lower)).squeeze(-1)


def _truncate(mass: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The likeliest tokens in falling order: their mass (0 beyond the nucleus) and their ids, both [n, k]."""
    if sampling.top_k > 0:
        ordered, order = mass.topk(min(sampling.top_k, mass.shape[-1]), dim=-1)
    else:
        ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    if sampling.top_p < 1.0:
        before = ordered.cumsum(-1, dtype=torch.float64)
        total = before[:, -1:].clone()
        before -= ordered
        ordered = torch.where(before < sampling.top_p * total, ordered, 0.0)
    return ordered, order
