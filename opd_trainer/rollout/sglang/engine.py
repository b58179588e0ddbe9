"""Rollouts from SGLang servers: samples stream back as they finish, weights go in, dead servers come back with them."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from opd_trainer.errors import OpdError, UserError, WorkerError
from opd_trainer.metrics import Metrics
from opd_trainer.rollout.config import SglangRollout, SyncVia
from opd_trainer.rollout.sglang.requests import Batch
from opd_trainer.sglang.client import ClientConfig, SglangClient
from opd_trainer.sglang.command import Purpose
from opd_trainer.sglang.endpoints import Endpoint
from opd_trainer.sglang.failure import RequestFailed
from opd_trainer.sglang.fleet import Fleet
from opd_trainer.sglang.sync import DiskSync, DistributedSync, TensorSync, WeightSync, own_address, update
from opd_trainer.types import Request, Sample, Sampling, ScoreStatus, WeightStream

CACHE, WEIGHTS = "kv_cache", "weights"
"""What servers give back, in SGLang's words."""
POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangSpec:
    """What an SGLang engine is made of.

    Attributes:
        folder: config.json and tokenizer of the student, in Hugging Face's form; servers start with its weights.
        eos_token_ids: the model's own end-of-sequence tokens.
        decode: responses -> texts, without special tokens.
        rollout: settings.
        run_dir: for logs of servers and for weights on their way through disk.
        has_weights: `folder` has some; otherwise servers start with none, and wait for the first sync.
    """

    folder: Path
    eos_token_ids: tuple[int, ...]
    decode: Callable[[list[list[int]]], list[str]]
    rollout: SglangRollout
    run_dir: Path
    has_weights: bool = True


class SglangEngine:
    """Implements `RolloutEngine`.

    The weights of the current version stay in host memory, for servers that are started anew in the middle of a step.

    Args:
        spec: what it is made of.
        fleet: the servers; None launches those that the settings ask for.
    """

    def __init__(self, spec: SglangSpec, fleet: Fleet | None = None) -> None:
        rollout = spec.rollout
        if fleet is None:
            purpose = Purpose(releases_memory=rollout.release_memory, weights=spec.has_weights)
            launch = ("rollout", str(spec.folder), rollout.launch, spec.run_dir / "servers", purpose)
            fleet = Fleet(rollout.urls) if rollout.urls else Fleet.launch(*launch)
        self._spec, self._fleet = spec, fleet
        limits = ClientConfig(timeout_s=rollout.timeout_s, concurrency=rollout.concurrency, attempts=rollout.attempts)
        self.client = SglangClient(fleet.urls, limits, self._repair)
        self._sync = self._make_sync()
        self._version: int | None = None
        self._weights: list[list[tuple[str, Tensor]]] = []
        self._locks = {url: asyncio.Lock() for url in fleet.urls}
        self._asleep: dict[str, set[str]] = {}
        self._generating = False
        self._failed = 0

    async def start(self) -> None:
        """Launches servers that are ours, and opens the connection.

        Raises:
            WorkerError: a server did not come up.
        """
        await self._fleet.start()
        await self.client.start()

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> AsyncGenerator[Sample, None]:
        """Yields exactly one sample for each request as it finishes; one that no server answered is aborted and empty.

        Raises:
            OpdError: no weights were loaded, or earlier requests are under way.
            WorkerError: servers refused a request, died too often, or left more than `max_failed_fraction` unanswered.
        """
        if self._version is None or self._asleep:
            raise OpdError("rollout: the servers have no weights of ours: load must succeed before generate")
        if self._generating:
            raise OpdError("rollout: earlier requests are under way: exhaust or close the earlier iterator first")
        rollout = self._spec.rollout
        batch = Batch(
            client=self.client,
            sampling=sampling,
            stop_token_ids=tuple(sorted({*self._spec.eos_token_ids, *sampling.stop_token_ids})),
            version=self._version,
            decode=self._spec.decode,
            straggler_after_s=rollout.straggler_after_s,
            keep_partial=rollout.keep_partial,
        )
        self._generating = True
        try:
            async with aclosing(batch.run(requests)) as samples:
                async for sample in samples:
                    yield sample
        finally:
            self._generating = False
        self._failed += len(batch.failures)
        if len(batch.failures) > rollout.max_failed_fraction * len(requests):
            raise WorkerError(
                f"rollout: servers left {len(batch.failures)} of {len(requests)} requests unanswered, more than "
                f"rollout.max_failed_fraction={rollout.max_failed_fraction:g} allows (last: {batch.failures[-1]})"
            )

    async def load(self, weights: WeightStream) -> None:
        """Gives every server the new weights, paused and with its cache flushed.

        Raises:
            WorkerError: a server did not take them, and could not be started anew.
        """
        if self._generating:
            raise OpdError("rollout: cannot load weights while responses are generated")
        self._version, self._weights = None, []
        # Copies: the learner goes on writing to its tensors, and a server may need these again.
        async for bucket in weights.buckets:
            self._weights.append([(name, tensor.detach().to("cpu", copy=True)) for name, tensor in bucket])
        if not self._weights:
            raise OpdError("rollout: a weight sync without a single tensor")
        self._version = weights.version
        await asyncio.gather(*(self._load(endpoint) for endpoint in self.client.pool.endpoints))

    @asynccontextmanager
    async def asleep(self) -> AsyncIterator[None]:
        """With `release_memory`, servers have no weights and no cache inside; `load` takes back memory for weights.

        Raises:
            WorkerError: a server refused.
        """
        if not self._spec.rollout.release_memory:
            yield
            return
        self._version = None
        await asyncio.gather(*(self._release(endpoint) for endpoint in self.client.pool.endpoints))
        yield
        await asyncio.gather(*(self._resume(endpoint, WEIGHTS, CACHE) for endpoint in self.client.pool.endpoints))

    def metrics(self) -> Metrics:
        """rollout/retries and rollout/unanswered since the last call, rollout/restarts since the start."""
        metrics = Metrics().put("rollout/retries", self.client.num_retries)
        metrics.put("rollout/restarts", self._fleet.num_restarts).put("rollout/unanswered", self._failed)
        self.client.num_retries = self._failed = 0
        return metrics

    async def close(self) -> None:
        """Closes the connection, stops servers that are ours and forgets the weights. Safe to call twice."""
        for endpoint in self.client.pool.endpoints:
            await self._sync.forget(endpoint)
        await self.client.close()
        await self._fleet.close()
        self._version, self._weights = None, []

    async def _load(self, endpoint: Endpoint) -> None:
        async with self._locks[endpoint.url]:
            await self._revive(endpoint)
            await self._resume(endpoint, WEIGHTS)
            try:
                await self._push(endpoint)
            except WorkerError as error:
                # It may have died over it, or the connection broke; a server that lives and refuses will refuse again.
                if not await self._revive(endpoint) and not _broke_off(error):
                    raise
                await self._push(endpoint)
            self.client.pool.succeeded(endpoint)

    async def _repair(self, endpoint: Endpoint) -> None:
        """After a failed request: a server that died is started, one that lost our weights gets them again."""
        lock = self._locks[endpoint.url]
        waited = lock.locked()
        async with lock:
            if waited:
                # Another request's repair has just ended.
                return
            await self._revive(endpoint)
            try:
                info = await self.client.info(endpoint, "/model_info")
            except RequestFailed:
                # Still down; the pool leaves it alone for a while.
                return
            if str(info["weight_version"]) != str(self._version):
                # A new process, although nobody told us; it knows nothing of what was agreed with the old one.
                await self._sync.forget(endpoint)
                await self._push(endpoint)
            self.client.pool.succeeded(endpoint)

    async def _revive(self, endpoint: Endpoint) -> bool:
        started = await self._fleet.ensure(endpoint.url)
        if started:
            # A new process, with all its memory.
            self._asleep.pop(endpoint.url, None)
            await self._sync.forget(endpoint)
        return started

    async def _release(self, endpoint: Endpoint) -> None:
        await self._settle(endpoint)
        if await self._order(endpoint, "/release_memory_occupation", {"tags": [CACHE, WEIGHTS]}):
            self._asleep[endpoint.url] = {CACHE, WEIGHTS}

    async def _resume(self, endpoint: Endpoint, *tags: str) -> None:
        """In two parts, weights before the cache, which would not fit while the trainer's memory is still taken."""
        wanted = self._asleep.get(endpoint.url, set()) & set(tags)
        if not wanted:
            return
        done = await self._order(endpoint, "/resume_memory_occupation", {"tags": sorted(wanted)})
        # Whoever takes the place of a server that died has all its memory.
        left = self._asleep.pop(endpoint.url) - wanted
        if done and left:
            self._asleep[endpoint.url] = left

    async def _settle(self, endpoint: Endpoint) -> None:
        """Waits until nothing runs: a server that is told to release memory under a request dies of it."""
        timeout_s = self._spec.rollout.sync_timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                # Refused while requests run.
                await self.client.ask(endpoint, "/flush_cache", {}, timeout_s)
                return
            except RequestFailed as failure:
                if failure.transient:
                    return
                if time.monotonic() > deadline:
                    raise WorkerError(f"rollout: {endpoint.url} did not come to rest: {failure}") from failure
                await asyncio.sleep(POLL_S)

    async def _order(self, endpoint: Endpoint, path: str, body: dict[str, Any]) -> bool:
        """Whether a server did it; one that is gone did not, and is started by the next `load`."""
        try:
            await self.client.ask(endpoint, path, body, self._spec.rollout.sync_timeout_s)
        except RequestFailed as failure:
            if failure.transient:
                return False
            raise WorkerError(f"rollout: {failure}. rollout.release_memory needs SGLang's memory saver") from failure
        return True

    async def _push(self, endpoint: Endpoint) -> None:
        assert self._version is not None, "weights are pushed after they were collected"
        timeout_s = self._spec.rollout.sync_timeout_s
        await update(self.client, self._sync, endpoint, self._weights, version=self._version, timeout_s=timeout_s)

    def _make_sync(self) -> WeightSync:
        import torch

        rollout, client = self._spec.rollout, self.client
        hosts = {urlsplit(url).hostname or "" for url in self._fleet.urls}
        match rollout.sync_via:
            case SyncVia.tensor:
                distant = sorted(host for host in hosts if host not in ("localhost", own_address(host)))
                if distant:
                    raise UserError(
                        f"rollout.sync_via=tensor: {', '.join(distant)} is another machine, out of reach of "
                        "shared memory. Set rollout.sync_via=distributed or disk"
                    )
                return TensorSync(client, rollout.sync_timeout_s)
            case SyncVia.distributed:
                backend = "nccl" if torch.cuda.is_available() else "gloo"
                return DistributedSync(client, rollout.sync_timeout_s, backend, own_address(min(hosts)))
            case SyncVia.disk:
                folder = Path(rollout.sync_dir) if rollout.sync_dir else self._spec.run_dir / "sync"
                return DiskSync(client, rollout.sync_timeout_s, folder, self._spec.folder)


def _broke_off(error: WorkerError) -> bool:
    """Whether a connection failed, and nothing was refused."""
    cause = error.__cause__
    return isinstance(cause, RequestFailed) and cause.transient and cause.status is not ScoreStatus.timeout
