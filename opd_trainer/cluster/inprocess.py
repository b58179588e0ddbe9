"""The worker group of one worker in the caller's own process: in its thread, so that pdb works, or beside it."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from opd_trainer.cluster.rendezvous import local_rendezvous
from opd_trainer.errors import OpdError, WorkerError


class InProcessGroup:
    """Implements `WorkerGroup` with a single worker.

    Args:
        make_worker: builds the worker from (rank, world size, rendezvous).
        own_thread: the worker lives in a thread of its own, and the event loop goes on during a call; otherwise calls
            block it until they return.
    """

    def __init__(self, make_worker: Callable[[int, int, str], Any], *, own_thread: bool = False) -> None:
        self._make_worker = make_worker
        self._worker: Any = None
        self._own_thread = own_thread
        self._thread: ThreadPoolExecutor | None = None

    @property
    def size(self) -> int:
        """Always 1."""
        return 1

    @property
    def worker(self) -> Any:
        """The worker itself, for debugging.

        Raises:
            WorkerError: the group is not started.
        """
        if self._worker is None:
            raise WorkerError("the worker group is not started, or is closed")
        return self._worker

    async def start(self) -> None:
        """Creates the worker and calls its `start`; a worker that fails to start is closed."""
        if self._own_thread:
            # One and the same for every call: some of what backends keep belongs to a thread.
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="worker")
        self._worker = await self._run(self._make_worker, 0, 1, local_rendezvous())
        try:
            await self.call("start")
        except BaseException:
            await self.close()
            raise

    async def call(self, method: str, *args: Any) -> list[Any]:
        """Calls `method`.

        Raises:
            OpdError: the worker raised it.
            WorkerError: the worker raised anything else, which is the cause.
        """
        bound = getattr(self.worker, method)
        try:
            return [await self._run(bound, *args)]
        except OpdError:
            raise
        except Exception as error:
            raise WorkerError(f"worker 0 failed in {method}: {type(error).__name__}: {error}") from error

    async def call_each(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Calls `method` with the one tuple of arguments; see `call`."""
        (only,) = args
        return await self.call(method, *only)

    async def close(self) -> None:
        """Calls the worker's `close`. Safe to call twice."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await self._run(worker.close)
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function where the worker lives."""
        if self._thread is None:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)
