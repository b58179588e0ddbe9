"""Processes that may be lost: what a hostile input could make endless runs in them, under a limit that holds."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

import opd_trainer
from opd_trainer.errors import WorkerError

START_TIMEOUT_S = 120.0
GRACE_S = 2.0
"""How much longer than its own limit a process may take to be gone."""


class Sandbox:
    """`num_workers` processes of `opd_trainer.reward.worker`, started when first needed and replaced when lost."""

    def __init__(self, task: str, num_workers: int, timeout_s: float) -> None:
        self._task = task
        self._timeout_s = timeout_s
        self._running: set[Process] = set()
        # None is a place whose process is to be started.
        self._idle: asyncio.Queue[Process | None] = asyncio.Queue()
        for _ in range(num_workers):
            self._idle.put_nowait(None)

    async def ask(self, **question: Any) -> float:
        """The worker's value for a question; waiting for a free worker does not count as time.

        Raises:
            TimeoutError: the answer took longer than `timeout_s`.
            WorkerError: the worker raised, or died before its time was over.
        """
        worker = await self._idle.get()
        try:
            if worker is None or worker.returncode is not None:
                worker = await self._start()
            answer = await self._exchange(worker, question)
        except BaseException:
            # Also when cancelled: an answer that nobody waits for would be taken for the next one's.
            if worker is not None:
                await self._end(worker)
            worker = None
            raise
        finally:
            self._idle.put_nowait(worker)
        if "error" in answer:
            raise WorkerError(f"the reward could not be computed: {answer['error']}")
        return answer["value"]

    async def _exchange(self, worker: Process, question: dict[str, Any]) -> dict[str, Any]:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(question).encode() + b"\n")
        started = asyncio.get_running_loop().time()
        line = await asyncio.wait_for(worker.stdout.readline(), self._timeout_s + GRACE_S)
        if line:
            return json.loads(line)
        if asyncio.get_running_loop().time() - started >= 0.9 * self._timeout_s:
            raise TimeoutError(f"the reward took longer than {self._timeout_s:g} s")
        raise WorkerError(f"the reward's process died with exit code {await worker.wait()}")

    async def _start(self) -> Process:
        source = str(Path(opd_trainer.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        worker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "opd_trainer.reward.worker",
            self._task,
            str(self._timeout_s),
            stdin=PIPE,
            stdout=PIPE,
            env=os.environ | {"PYTHONPATH": path},
        )
        self._running.add(worker)
        assert worker.stdout is not None
        try:
            ready = await asyncio.wait_for(worker.stdout.readline(), START_TIMEOUT_S)
        except BaseException:
            await self._end(worker)
            raise
        if not ready:
            await self._end(worker)
            raise WorkerError("the reward's process did not start; its own message is above")
        return worker

    async def _end(self, worker: Process) -> None:
        self._running.discard(worker)
        if worker.returncode is None:
            worker.kill()
        await worker.wait()

    async def close(self) -> None:
        """Ends every process. Safe to call twice."""
        for worker in list(self._running):
            await self._end(worker)
