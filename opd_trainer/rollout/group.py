"""Several embedded engines as one: requests are dealt to the workers of a group, samples stream back as they finish."""

from collections.abc import AsyncGenerator, Sequence

from opd_trainer.protocols import WorkerGroup
from opd_trainer.rollout.embedded.worker import Progress
from opd_trainer.types import Request, Sample, Sampling, WeightStream

POLL_SECONDS = 0.25
"""How long workers decode between two collections; finished samples wait at most this long."""


class EngineGroup:
    """Implements `RolloutEngine` over a group of `EmbeddedWorker`.

    A sample depends only on its request and the weights, so the number of workers does not show in the samples.

    Args:
        group: the workers.
    """

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group

    async def start(self) -> None:
        """Creates and starts the workers."""
        await self._group.start()

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> AsyncGenerator[Sample, None]:
        """Yields each sample soon after it finishes; see `EmbeddedWorker.begin` and `poll` for the errors.

        Raises:
            WorkerError: a worker died or did not answer.
        """
        shares = deal(requests, self._group.size, sampling.max_response_tokens)
        await self._group.call_each("begin", [(share, sampling) for share in shares])
        done = False
        try:
            while not done:
                progress: list[Progress] = await self._group.call("poll", POLL_SECONDS)
                done = all(worker.done for worker in progress)
                for worker in progress:
                    for sample in worker.samples:
                        yield sample
        finally:
            if not done:
                await self._group.call("cancel")

    async def load(self, weights: WeightStream) -> None:
        """Sends new weights to every worker; see `EmbeddedWorker.load_bucket` and `commit` for the errors."""
        async for bucket in weights.buckets:
            await self._group.call("load_bucket", bucket)
        await self._group.call("commit", weights.version)

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
