"""A frozen model on workers of its own, behind the controller."""

from torch import Tensor

from opd_trainer.megatron.packing import merge
from opd_trainer.megatron.shards import Shards
from opd_trainer.protocols import WorkerGroup
from opd_trainer.types import TokenBatch, WeightStream


class MegatronScorer:
    """Scores batches on a group of `ScoringWorker`s.

    Args:
        group: the workers.
        max_tokens: budget of a micro-batch; 1 computes each sequence alone.
        bucket_bytes: largest bucket of a weight stream.
    """

    def __init__(self, group: WorkerGroup, *, max_tokens: int, bucket_bytes: int) -> None:
        self._shards, self._bucket_bytes = Shards(group, max_tokens), bucket_bytes

    async def start(self) -> None:
        """Starts the workers, which load the model."""
        await self._shards.start()

    async def score(self, batch: TokenBatch) -> Tensor:
        """Log-probs f32[T], NaN where the mask is False.

        Raises:
            WorkerError: a worker failed.
        """
        planned = self._shards.plan(batch)
        return merge(planned, self._shards.by_dp_rank(await self._shards.call("score", batch, planned)))

    def weights(self) -> WeightStream:
        """Its weights under Hugging Face names."""
        return WeightStream(0, self._shards.weights("teacher", self._bucket_bytes))

    async def close(self) -> None:
        """Tears down the workers completely. Safe to call twice."""
        await self._shards.close()
