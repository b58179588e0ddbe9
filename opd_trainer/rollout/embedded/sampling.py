"""Drawing the next token: one uniform per token, turned into a token by the inverse of the distribution function.

n = rows, V = vocabulary. A token depends on its row's logits and uniform only, so it cannot depend on who else is in
the batch.
"""

import torch
from torch import Tensor

from opd_trainer.types import Sampling


def uniforms(seeds: list[int], count: int) -> Tensor:
    """f64[len(seeds), count] in [0, 1): the randomness of each request, from its own seed."""
    generator = torch.Generator()
    rows = torch.empty(len(seeds), count, dtype=torch.float64)
    for row, seed in zip(rows, seeds, strict=True):
        generator.manual_seed(seed)
        torch.rand(count, dtype=torch.float64, generator=generator, out=row)
    return rows


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens i64[n] and their log-probs f32[n].

    The log-prob is that of the full softmax at the sampling temperature (at temperature 1 when greedy), before top-k
    and top-p; it is NaN where the row's logits are not finite.

    Args:
        logits: f32[n, V]; overwritten.
        sampling: temperature, top_k, top_p (top-k first, then top-p on what it left).
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
    log_prob = logits.gather(-1, token) - mass.sum(-1, keepdim=True).log()
    return token.squeeze(-1), log_prob.squeeze(-1)


def _inverse(mass: Tensor, uniform: Tensor) -> Tensor:
    """The first index [n, 1] at which the running sum of `mass` [n, V] exceeds `uniform` times its total."""
    # float64: in float32 the running sum over a large vocabulary would lose the tail.
    running = mass.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(running, uniform.unsqueeze(-1) * running[:, -1:], right=True)
    return index.clamp_(max=mass.shape[-1] - 1)


def _truncate(mass: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The likeliest tokens in falling order: their mass (0 beyond the nucleus) and their ids, both [n, k]."""
    size = mass.shape[-1]
    keep = min(sampling.top_k, size) if sampling.top_k > 0 else size
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    ordered, order = ordered[:, :keep], order[:, :keep]
    if sampling.top_p < 1.0:
        before = ordered.cumsum(-1, dtype=torch.float64)
        total = before[:, -1:].clone()
        before -= ordered
        ordered = torch.where(before < sampling.top_p * total, ordered, 0.0)
    return ordered, order
