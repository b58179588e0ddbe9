"""The embedded engine in the caller's own process and thread."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager

from opd_trainer.metrics import Metrics
from opd_trainer.rollout.embedded.worker import EmbeddedSpec, EmbeddedWorker
from opd_trainer.types import Request, Sample, Sampling, WeightStream


class EmbeddedEngine:
    """Implements `RolloutEngine`; other coroutines run between decoding steps.

    Args:
        spec: what it is made of.
    """

    def __init__(self, spec: EmbeddedSpec) -> None:
        self._worker = EmbeddedWorker(spec)

    async def start(self) -> None:
        """Allocates the weights.

        Raises:
            UserError: the embedded engine does not decode this model.
        """
        self._worker.start()

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> AsyncGenerator[Sample, None]:
        """Yields each sample as it finishes; see `EmbeddedWorker.begin` and `poll` for the errors."""
        self._worker.begin(requests, sampling)
        try:
            while True:
                progress = self._worker.poll(0.0)
                for sample in progress.samples:
                    yield sample
                if progress.done:
                    return
                await asyncio.sleep(0)
        finally:
            self._worker.cancel()

    async def load(self, weights: WeightStream) -> None:
        """Takes new weights; see `EmbeddedWorker.load_bucket` and `commit` for the errors."""
        async for bucket in weights.buckets:
            self._worker.load_bucket(bucket)
        self._worker.commit(weights.version)

    def asleep(self) -> AbstractAsyncContextManager[None]:
        """See `RolloutEngine`; it keeps its memory."""
        return contextlib.nullcontext()

    def metrics(self) -> Metrics:
        """Nothing can go wrong without an exception."""
        return Metrics()

    async def close(self) -> None:
        """Releases everything. Safe to call twice."""
        self._worker.close()
