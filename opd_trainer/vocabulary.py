"""A vocabulary that several ranks share: each holds the columns of some ids, and these are the ways to talk.

R = positions, P = columns of this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, slots=True)
class VocabularyShards:
    """How ranks that share a vocabulary talk; the defaults are those of one rank that holds it all.

    Attributes:
        first: id of this rank's first column.
        total: sum over ranks; its gradient is passed through (the result is used the same way on every rank).
        copy: identity; its gradient is summed over ranks (a value common to all ranks enters each one's own entries).
        largest: maximum over ranks, without gradient.
        gather: those of all ranks side by side in the last dimension, without gradient.
    """

    first: int = 0
    total: Callable[[Tensor], Tensor] = _same
    copy: Callable[[Tensor], Tensor] = _same
    largest: Callable[[Tensor], Tensor] = _same
    gather: Callable[[Tensor], Tensor] = _same

    def at(self, values: Float[Tensor, "R P"], ids: Int64[Tensor, "R K"]) -> Float[Tensor, "R K"]:
        """The values at vocabulary ids, whichever rank holds them."""
        column = ids - self.first
        present = (column >= 0) & (column < values.shape[-1])
        mine = values.gather(-1, torch.where(present, column, 0))
        return self.total(torch.where(present, mine, 0.0))

    def top(self, values: Float[Tensor, "R P"], k: int) -> Int64[Tensor, "R K"]:
        """Ids of the k largest values of each position, largest first; fewer where the vocabulary is smaller."""
        best = values.detach().topk(min(k, values.shape[-1]), dim=-1)
        sizes, ids = self.gather(best.values), self.gather(best.indices + self.first)
        return ids.gather(-1, sizes.topk(min(k, sizes.shape[-1]), dim=-1).indices)


WHOLE = VocabularyShards()
