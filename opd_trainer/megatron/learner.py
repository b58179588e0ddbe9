"""The student behind the controller: shards batches over Megatron workers and puts their results together."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from torch import Tensor

from opd_trainer.megatron.packing import Plan, merge
from opd_trainer.megatron.shards import Shards
from opd_trainer.megatron.spec import RankCritic, RankUpdate
from opd_trainer.protocols import TokenLoss, WorkerGroup
from opd_trainer.types import TokenBatch, WeightStream
from opd_trainer.updates import CriticResult, UpdateResult

MODEL_OF_FIELD = {"old": "student", "values": "critic"}
"""The model that fills in a field of a batch, where its name is another one."""


class MegatronLearner:
    """Implements `Learner` on a group of `MegatronWorker`s.

    Args:
        group: the workers.
        max_tokens: budget of a micro-batch.
        bucket_bytes: largest bucket of a weight stream.
    """

    def __init__(self, group: WorkerGroup, *, max_tokens: int, bucket_bytes: int) -> None:
        self._shards, self._group, self._bucket_bytes = Shards(group, max_tokens), group, bucket_bytes

    async def start(self) -> None:
        """Starts the workers, which build and load their models."""
        await self._shards.start()

    @contextlib.asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        """Weights and optimizer stay on their devices: nothing to do."""
        yield

    async def score(self, batch: TokenBatch, model: str) -> Tensor:
        """Forward-only log-probs (the critic's values) f32[T], NaN where the mask is False.

        Args:
            batch: any batch.
            model: "student" ("old" is the student before its first update on the batch), "reference", "critic" (whose
                are the "values"), "teacher" (each sequence's own) or "teacher:<name>".
        """
        planned = self._shards.plan(batch)
        results = await self._shards.call("score", batch, planned, MODEL_OF_FIELD.get(model, model))
        return merge(planned, self._shards.by_dp_rank(results))

    async def update(self, batch: TokenBatch, loss: TokenLoss) -> UpdateResult:
        """Exactly one optimizer step on sum_t weight[t] * loss[t]; inline teachers are scored on the way.

        Raises:
            TrainingDiverged: a loss or gradient is not finite.
            WorkerError: a worker failed.
        """
        planned = self._shards.plan(batch)
        every: list[RankUpdate] = await self._shards.call("update", batch, planned, loss)
        ranks: list[RankUpdate] = self._shards.by_dp_rank(every)
        return UpdateResult(
            log_probs=merge(planned, [rank.log_probs for rank in ranks]),
            entropy=merge(planned, [rank.entropy for rank in ranks]),
            teacher=_merge_given(planned, [rank.teacher for rank in ranks]),
            divergence=_merge_given(planned, [rank.divergence for rank in ranks]),
            overlap=_merge_given(planned, [rank.overlap for rank in ranks]),
            loss=sum(rank.loss for rank in ranks),
            grad_norm=ranks[0].grad_norm,
            learning_rate=ranks[0].learning_rate,
            seconds={phase: max(rank.seconds[phase] for rank in every) for phase in every[0].seconds},
            packing_efficiency=planned.efficiency,
            num_micro_batches=planned.num_micro_batches,
            peak_memory_bytes=max(rank.peak_memory_bytes for rank in every),
            flop_per_worker=sum(rank.flop for rank in ranks) / len(every),
            peak_flop_per_s=every[0].peak_flop_per_s,
            critic=_critic_result(planned, [rank.critic for rank in ranks if rank.critic is not None]),
        )

    def weights(self, version: int, model: str = "student") -> WeightStream:
        """The weights of "student" or "teacher:<name>", under Hugging Face names; read before the next update."""
        return WeightStream(version, self._shards.weights(model, self._bucket_bytes))

    async def save(self, directory: Path, *, background: bool = False) -> None:
        """Writes weights, optimizer, schedule and RNG into `directory`, which exists and is empty.

        Args:
            directory: to write to.
            background: return as soon as the state is copied; `finish_save` completes what was written.

        Raises:
            CheckpointError: a worker cannot write.
        """
        await self._group.call("save", directory, background)

    async def finish_save(self, *, wait: bool) -> bool:
        """Completes a save in the background, if it is written or `wait` is set; whether none is under way any more.

        Raises:
            CheckpointError: a worker could not write.
        """
        if not wait and not all(await self._group.call("save_done")):
            return False
        await self._group.call("finish_save")
        return True

    async def restore(self, directory: Path) -> None:
        """The inverse of `save`.

        Raises:
            CheckpointError: `directory` holds no training state of this model.
        """
        await self._group.call("restore", directory)

    async def export(self, directory: Path) -> None:
        """Writes the student as a Hugging Face folder."""
        await self._group.call("export", directory)

    async def close(self) -> None:
        """Tears down the workers completely. Safe to call twice."""
        await self._shards.close()


def _merge_given(planned: Plan, ranks: Sequence[list[Tensor] | None]) -> Tensor | None:
    """What all ranks or none of them give."""
    given = [values for values in ranks if values is not None]
    return merge(planned, given) if given else None


def _critic_result(planned: Plan, ranks: Sequence[RankCritic]) -> CriticResult | None:
    """The critic's step from the parts of all data-parallel ranks; None without a critic."""
    if not ranks:
        return None
    return CriticResult(
        values=merge(planned, [rank.values for rank in ranks]),
        loss=sum(rank.loss for rank in ranks),
        grad_norm=ranks[0].grad_norm,
        learning_rate=ranks[0].learning_rate,
    )
