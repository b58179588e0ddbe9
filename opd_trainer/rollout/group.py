"""Several embedded engines as one: requests are dealt to the workers of a group, samples stream back as they finish."""

import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

from opd_trainer.errors import WorkerDied
from opd_trainer.metrics import Metrics
from opd_trainer.protocols import WorkerGroup
from opd_trainer.rollout.embedded.worker import Progress
from opd_trainer.types import Request, Sample, Sampling, WeightStream

ReplaceDead = Callable[[], Awaitable[list[int]]]

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
"""How long workers decode between two collections; finished samples wait at most this long."""


class EngineGroup:
    """Implements `RolloutEngine` over a group of `EmbeddedWorker`.

    A sample depends only on its request and the weights, so that neither the number of workers nor the death of one
    shows in the samples.

    Args:
        group: the workers.
        replace_dead: makes and starts new workers for those of `group` that died, and says which ranks are new.
        max_restarts: how often it may; with 0 their weights need not be kept here.
    """

    def __init__(self, group: WorkerGroup, *, replace_dead: ReplaceDead | None = None, max_restarts: int = 0) -> None:
        self._group, self._replace = group, replace_dead
        self._restarts_left = 0 if replace_dead is None else max_restarts
        self._num_restarts = 0
        self._version = 0
        self._buckets: list[Any] = []

    async def start(self) -> None:
        """Creates and starts the workers."""
        await self._group.start()

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> AsyncGenerator[Sample, None]:
        """Yields each sample soon after it finishes; see `EmbeddedWorker.begin` and `poll` for the errors.

        Raises:
            WorkerError: a worker died or did not answer, more often than `max_restarts`.
        """
        missing = {(request.prompt.id, request.index): request for request in requests}
        while missing:
            try:
                async with aclosing(self._generate(list(missing.values()), sampling)) as samples:
                    async for sample in samples:
                        del missing[sample.prompt.id, sample.index]
                        yield sample
            except WorkerDied as error:
                await self._replace_dead(error)

    async def _generate(self, requests: Sequence[Request], sampling: Sampling) -> AsyncGenerator[Sample, None]:
        shares = deal(requests, self._group.size, sampling.max_response_tokens)
        await self._group.call_each("begin", [(share, sampling) for share in shares])
        done = died = False
        try:
            while not done:
                progress: list[Progress] = await self._group.call("poll", POLL_SECONDS)
                done = all(worker.done for worker in progress)
                for worker in progress:
                    for sample in worker.samples:
                        yield sample
        except WorkerDied:
            died = True
            raise
        finally:
            if not done and not died:
                await self._group.call("cancel")

    async def load(self, weights: WeightStream) -> None:
        """Sends new weights to every worker; see `EmbeddedWorker.load_bucket` and `commit` for the errors."""
        self._version, self._buckets = weights.version, []
        died: WorkerDied | None = None
        async for bucket in weights.buckets:
            if self._restarts_left:
                self._buckets.append(bucket)
            if died is None:
                try:
                    await self._group.call("load_bucket", bucket)
                except WorkerDied as error:
                    if not self._restarts_left:
                        raise
                    died = error
        try:
            if died is not None:
                raise died
            await self._group.call("commit", weights.version)
        except WorkerDied as error:
            await self._replace_dead(error)

    async def _replace_dead(self, error: WorkerDied) -> None:
        """New workers for dead ones, and the current weights for all: some may have a part of them only."""
        while True:
            if self._restarts_left == 0 or self._replace is None:
                raise error
            self._restarts_left -= 1
            self._num_restarts += 1
            try:
                replaced = await self._replace()
                log.warning("%s\nrollout workers %s are new; the run goes on", error, replaced)
                await self._group.call("cancel")
                for bucket in self._buckets:
                    await self._group.call("load_bucket", bucket)
                if self._buckets:
                    await self._group.call("commit", self._version)
            except WorkerDied as again:
                error = again
            else:
                return

    def asleep(self) -> AbstractAsyncContextManager[None]:
        """See `RolloutEngine`; they keep their memory."""
        return contextlib.nullcontext()

    def metrics(self) -> Metrics:
        """rollout/restarts so far, where workers are replaced."""
        replaces = self._num_restarts + self._restarts_left > 0
        return Metrics().put("rollout/restarts", self._num_restarts) if replaces else Metrics()

    async def close(self) -> None:
        """Releases everything. Safe to call twice."""
        await self._group.close()


def deal(requests: Sequence[Request], workers: int, max_response_tokens: int) -> list[list[Request]]:
    """Cuts requests, longest prompt first, into one run for each worker, of about equal cost.

    Runs keep siblings side by side, so that their prompt is processed once. The cost of a request is its tokens.
    """
    ordered = sorted(requests, key=lambda request: -len(request.prompt.tokens))
    costs = [len(request.prompt.tokens) + max_response_tokens for request in ordered]
    total, before = sum(costs), 0
    shares: list[list[Request]] = [[] for _ in range(workers)]
    for request, cost in zip(ordered, costs, strict=True):
        shares[(2 * before + cost) * workers // (2 * total)].append(request)
        before += cost
    return shares
