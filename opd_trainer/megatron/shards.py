"""A batch cut into the micro-batches of a group of Megatron workers, and their results put together again."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_trainer.errors import OpdError
from opd_trainer.megatron.packing import Plan, plan
from opd_trainer.megatron.spec import Place
from opd_trainer.protocols import WorkerGroup
from opd_trainer.types import TokenBatch


class Shards:
    """Workers that share batches.

    Args:
        group: the workers; they have `place`, `start_export` and `next_bucket`.
        max_tokens: budget of a micro-batch.
    """

    def __init__(self, group: WorkerGroup, max_tokens: int) -> None:
        self.group, self._max_tokens = group, max_tokens
        self._places: list[Place] = []

    async def start(self) -> None:
        """Starts the workers, which build and load their models."""
        await self.group.start()
        self._places = await self.group.call("place")

    async def close(self) -> None:
        """Tears down the workers completely. Safe to call twice."""
        await self.group.close()
        self._places = []

    def plan(self, batch: TokenBatch) -> Plan:
        """Which sequences share a micro-batch, and where it is computed.

        Raises:
            OpdError: the workers are not started.
        """
        if not self._places:
            raise OpdError("the Megatron workers are not started, or are closed")
        return plan(batch.lengths.tolist(), self._places[0].dp_size, self._max_tokens)

    async def call(self, method: str, batch: TokenBatch, planned: Plan, *args: Any) -> list[Any]:
        """Calls `method(micro-batches, *args)` of each worker; results by rank."""
        index = [[torch.tensor(sequences, dtype=torch.int64) for sequences in rank] for rank in planned.ranks]
        by_dp_rank = [[batch.take(sequences) for sequences in rank] for rank in index]
        return await self.group.call_each(method, [(by_dp_rank[place.dp_rank], *args) for place in self._places])

    def by_dp_rank(self, results: Sequence[Any]) -> list[Any]:
        """The results of the workers that report, by data-parallel rank."""
        pairs = zip(self._places, results, strict=True)
        reported = {place.dp_rank: result for place, result in pairs if place.reports}
        return [reported[rank] for rank in range(self._places[0].dp_size)]

    async def weights(self, model: str, bucket_bytes: int) -> AsyncIterator[list[tuple[str, Tensor]]]:
        """The weights of a model of the workers, bucket by bucket."""
        await self.group.call("start_export", bucket_bytes, model)
        while (bucket := (await self.group.call("next_bucket"))[0]) is not None:
            yield bucket
