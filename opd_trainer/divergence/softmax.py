"""Log-softmax of logits whose vocabulary may be spread over tensor-parallel ranks.

T = positions (a chunk), V = vocabulary entries of this rank. The divergences of this package take the result; they
never see more than the [T, V] that the caller hands them, so a caller bounds memory by the size of its chunks.
"""

from jaxtyping import Float
from torch import Tensor

from opd_trainer.vocabulary import WHOLE, VocabularyShards


def log_softmax(logits: Float[Tensor, "T V"], shards: VocabularyShards = WHOLE) -> Float[Tensor, "T V"]:
    """log p over the whole vocabulary, of this rank's entries; -inf logits (padding ids) stay -inf.

    Args:
        logits: already divided by the temperature, in the precision that the result should have.
        shards: how to reach the other entries.
    """
    highest = shards.largest(logits.detach().amax(-1, keepdim=True))
    log_total = shards.total((logits - highest).exp().sum(-1, keepdim=True)).log()
    return logits - highest - shards.copy(log_total)
