"""A server process that is ours: started, watched, started again, stopped, and never outliving us."""

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from opd_trainer.cluster import die_with_parent
from opd_trainer.errors import WorkerError
from opd_trainer.sglang.watch import Watch

STOP_S = 20.0
"""How long a server may take to end after SIGTERM before it is killed."""
POLL_S = 0.3
DYING_POLLS = 20
LOG_TAIL_LINES = 15
LOG_LINE_LENGTH = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """What a server process is.

    Attributes:
        name: for logs and messages.
        url: where it will answer.
        command: its command line.
        environment: added to ours.
        log: file that its output is appended to.
        start_timeout_s: limit until it is healthy.
        hang_after_s: how long it may not answer before it counts as dead.
        max_restarts: starts after the first.
    """

    name: str
    url: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    start_timeout_s: float
    hang_after_s: float
    max_restarts: int


class ManagedServer:
    """One server process.

    Args:
        spec: what it is.
        clock: for the time limit.
    """

    def __init__(self, spec: ServerSpec, clock: Callable[[], float] = time.monotonic) -> None:
        self.spec = spec
        self.num_restarts = 0
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: Watch | None = None
        self._closed = False
        self._lock = asyncio.Lock()

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Its process id, None before `start` and after `close`."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Launches it and waits until it is healthy.

        Raises:
            WorkerError: the port is taken, it died or was not ready in time; its last lines are quoted.
        """
        async with self._lock:
            self._closed = False
            await self._start()

    async def ensure(self) -> bool:
        """Starts it again if it died; True when it did.

        Raises:
            WorkerError: it died more often than allowed, did not come back, or was closed meanwhile.
        """
        async with self._lock:
            if self._process is None or await self._answers():
                return False
            if self.num_restarts >= self.spec.max_restarts:
                raise WorkerError(
                    f"{self.spec.name} died {self.num_restarts + 1} times: it is not started again. Its output is in "
                    f"{self.spec.log}\n{self._tail()}"
                )
            self.num_restarts += 1
            self._end()
            await self._until_free()
            await self._start()
            return True

    async def close(self) -> None:
        """Ends it: SIGTERM, and SIGKILL when that does not help in time. Safe to call twice, and during `ensure`."""
        self._closed = True
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            # To the server alone, which ends its processes in order.
            process.terminate()
            self._end_watch()
        deadline = self._clock() + STOP_S
        while process.poll() is None and self._clock() < deadline:
            await asyncio.sleep(0.05)
        self._end()
        self._process = None

    async def _start(self) -> None:
        spec = self.spec
        if self._closed:
            raise WorkerError(f"{spec.name} was closed, and is not started again")
        _check_free(spec)
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-I", str(die_with_parent.__file__), str(os.getpid()), *spec.command]
        with spec.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.environment},
                # Ctrl-C reaches the trainer alone, which then stops its servers in order.
                start_new_session=True,
            )
        try:
            await self._until_healthy()
        except BaseException:
            self._end()
            raise
        self._watch = Watch(spec.url, spec.hang_after_s, self._hung)

    async def _until_free(self) -> None:
        """Waits for the port: of a group that was killed, members may hold it for a moment longer than its leader."""
        deadline = self._clock() + STOP_S
        while self._clock() < deadline:
            try:
                _check_free(self.spec)
                return
            except WorkerError:
                await asyncio.sleep(POLL_S / 4)

    async def _answers(self) -> bool:
        """Whether the process lives; one that has just been killed may still look alive after its port has closed."""
        host, port = _host_and_port(self.spec)
        for _ in range(DYING_POLLS):
            if not self.alive:
                return False
            try:
                _, writer = await asyncio.open_connection(host, port)
            except OSError:
                await asyncio.sleep(POLL_S / 4)
                continue
            writer.close()
            return True
        return self.alive

    async def _until_healthy(self) -> None:
        spec, deadline = self.spec, self._clock() + self.spec.start_timeout_s
        timeout = aiohttp.ClientTimeout(total=10.0)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while self._clock() < deadline:
                if not self.alive:
                    raise WorkerError(f"{spec.name} died while starting; see {spec.log}\n{self._tail()}")
                try:
                    async with session.get(f"{spec.url}/health") as response:
                        if response.status == 200:
                            return
                except (aiohttp.ClientError, TimeoutError):
                    pass
                await asyncio.sleep(POLL_S)
        raise WorkerError(
            f"{spec.name} was not ready within {spec.start_timeout_s:g} s; see {spec.log}\n{self._tail()}"
        )

    def _hung(self) -> None:
        """Called by the watch. Whoever waits for the server then sees it die, and has it started again."""
        process, spec = self._process, self.spec
        if process is not None and process.poll() is None:
            print(f"{spec.name} has not answered for {spec.hang_after_s:g} s: it is killed; see {spec.log}", flush=True)
            _kill_group(process.pid)

    def _end_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.end()

    def _end(self) -> None:
        """Kills what is left of the process and its children."""
        self._end_watch()
        if self._process is not None:
            _kill_group(self._process.pid)
            self._process.wait()

    def _tail(self) -> str:
        lines = self.spec.log.read_text(encoding="utf-8", errors="replace").splitlines()
        # SGLang prints its whole configuration on one line.
        return "\n".join(line[:LOG_LINE_LENGTH] for line in lines[-LOG_TAIL_LINES:])


def _check_free(spec: ServerSpec) -> None:
    host, port = _host_and_port(spec)
    with socket.socket() as probe:
        # As servers do: a port whose last connections linger in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise WorkerError(
                    f"{spec.name}: nothing can listen on port {port} of {host} ({error}). Set launch.host to an "
                    "address of this machine, and launch.port to null, which takes a free one"
                ) from error
            raise WorkerError(
                f"{spec.name}: port {port} of {host} is taken ({error}): another server, perhaps of an earlier run, "
                "listens there. Stop it, or set another port (null takes a free one)"
            ) from error


def _host_and_port(spec: ServerSpec) -> tuple[str, int]:
    host, _, port = spec.url.rpartition("/")[2].rpartition(":")
    return host, int(port)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        # Already gone, with all its children.
        return
