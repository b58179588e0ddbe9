"""Log-softmax of logits whose vocabulary may be spread over tensor-parallel ranks.

T = positions (a chunk), V = vocabulary entries of this rank. The divergences of this package take the result; they
never see more than the [T, V] that the caller hands them, so a caller bounds memory by the size of its chunks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, slots=True)
class VocabularyShards:
    """How ranks that share a vocabulary talk; the defaults are those of one rank that holds it all.

    Attributes:
        total: sum over ranks; its gradient is passed through (the result is used the same way on every rank).
        copy: identity; its gradient is summed over ranks (a value common to all ranks enters each one's own entries).
        largest: maximum over ranks, without gradient.
    """

    total: Callable[[Tensor], Tensor] = _same
    copy: Callable[[Tensor], Tensor] = _same
    largest: Callable[[Tensor], Tensor] = _same


WHOLE = VocabularyShards()


def log_softmax(logits: Float[Tensor, "T V"], shards: VocabularyShards = WHOLE) -> Float[Tensor, "T V"]:
    """log p over the whole vocabulary, of this rank's entries; -inf logits (padding ids) stay -inf.

    Args:
        logits: already divided by the temperature, in the precision that the result should have.
        shards: how to reach the other entries.
    """
    highest = shards.largest(logits.detach().amax(-1, keepdim=True))
    log_total = shards.total((logits - highest).exp().sum(-1, keepdim=True)).log()
    return logits - highest - shards.copy(log_total)
