"""A Megatron teacher on workers of its own: scores responses while others are still being generated.

R = response tokens.
"""

import asyncio
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from opd_trainer.collation import collate
from opd_trainer.errors import TeacherError
from opd_trainer.megatron.scorer import MegatronScorer
from opd_trainer.metrics import Metrics
from opd_trainer.teacher.config import key_of
from opd_trainer.types import Finish, ModelIdentity, Sample, WeightStream


class DedicatedTeacher:
    """Scores samples; `score` is a `Judge`. Samples that arrive while the workers are busy go to them together.

    Args:
        scorer: the model on its workers.
        identity: who it is.
        temperature: of its log-probs.
        name: as the samples call it (`Prompt.teacher`); samples of other teachers pass through.
    """

    def __init__(self, scorer: MegatronScorer, identity: ModelIdentity, *, temperature: float, name: str) -> None:
        self.identity = identity
        self._scorer, self._temperature, self._name = scorer, temperature, name
        self._waiting: list[tuple[Sample, asyncio.Future[Tensor]]] = []
        self._draining: asyncio.Task[None] | None = None
        self._seconds: list[float] = []
        self._num_scored = 0

    async def start(self) -> None:
        """Starts the workers, which load the teacher.

        Raises:
            UserError: it cannot be loaded, or there are too few resources.
        """
        await self._scorer.start()

    async def score(self, sample: Sample) -> Sample:
        """The sample with `teacher_log_probs` f32[R] and their temperature.

        Raises:
            TeacherError: a log-prob is not finite.
            WorkerError: a worker of the teacher failed.
        """
        if sample.prompt.teacher != self._name or sample.finish is Finish.abort:
            return sample
        log_probs = torch.empty(0)
        if len(sample.response):
            scored = asyncio.get_running_loop().create_future()
            self._waiting.append((sample, scored))
            if self._draining is None or self._draining.done():
                self._draining = asyncio.create_task(self._drain())
            log_probs = await scored
        return sample.replace(teacher_log_probs=log_probs, teacher_temperature=self._temperature)

    def metrics(self) -> Metrics:
        """Since the last call: seconds that the workers were busy, and samples a call."""
        metrics = Metrics()
        if self._seconds:
            metrics.put("perf/dedicated_teacher", sum(self._seconds))
            metrics.put("perf/dedicated_teacher_samples_per_call", self._num_scored / len(self._seconds))
        self._seconds, self._num_scored = [], 0
        return metrics

    def weights(self) -> WeightStream:
        """Its weights, for an engine that answers in its place."""
        return self._scorer.weights()

    async def close(self) -> None:
        """Ends the workers. Safe to call twice."""
        draining, self._draining = self._draining, None
        if draining is not None:
            draining.cancel()
        await self._scorer.close()

    async def _drain(self) -> None:
        """Scores what waits until nothing does."""
        # Whoever landed at the same moment comes along.
        await asyncio.sleep(0)
        while self._waiting:
            taken, self._waiting = self._waiting, []
            try:
                results = await self._log_probs([sample for sample, _ in taken])
            except BaseException as error:
                failed, self._waiting = [*taken, *self._waiting], []
                for _, scored in failed:
                    if not scored.done():
                        scored.set_exception(error)
                if not isinstance(error, Exception):
                    raise
                return
            for (_, scored), log_probs in zip(taken, results, strict=True):
                if not scored.done():
                    scored.set_result(log_probs)

    async def _log_probs(self, samples: Sequence[Sample]) -> list[Tensor]:
        start = time.perf_counter()
        batch = collate(samples, self._temperature)
        scored = (await self._scorer.score(batch))[batch.mask]
        unknown = int((~scored.isfinite()).sum())
        if unknown:
            raise TeacherError(
                f"the teacher {self._name} gave no finite log-prob for {unknown} of {len(scored)} tokens: its weights "
                f"or activations overflowed. Look at {key_of(self._name)}.load, or load it in another dtype"
            )
        self._seconds.append(time.perf_counter() - start)
        self._num_scored += len(samples)
        return list(scored.split([len(sample.response) for sample in samples]))
