"""Server processes of our own, with the fake server in them: the whole life cycle without SGLang."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from opd_trainer.errors import UserError, WorkerError
from opd_trainer.rollout.config import SglangRollout, SyncVia
from opd_trainer.rollout.sglang.engine import SglangEngine, SglangSpec
from opd_trainer.sglang.config import LaunchConfig
from opd_trainer.sglang.fake_model import TableModel
from opd_trainer.sglang.fleet import Fleet
from opd_trainer.teacher.config import SglangManagedTeacher
from opd_trainer.teacher.sglang import SglangTeacher
from opd_trainer.types import Sample, ScoreStatus, WeightStream
from tests.sglang.serving import VOCAB, expected, requests, sample, sampling

Result = TypeVar("Result")
FAKE = "opd_trainer.sglang.fake"


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 400))


MODEL = Path(f"table:{VOCAB}:0")
"""What servers start with."""


def launch(**changes: Any) -> LaunchConfig:
    return LaunchConfig(**{"module": FAKE, "start_timeout_s": 200.0, **changes})


def stream(version: int) -> WeightStream:
    async def buckets() -> AsyncIterator[list[tuple[str, Tensor]]]:
        yield [("table", TableModel(VOCAB, seed=100 + version).table)]

    return WeightStream(version=version, buckets=buckets())


def engine(run_dir: Path, via: SyncVia, **changes: Any) -> SglangEngine:
    rollout = SglangRollout(launch=launch(**changes), sync_via=via, sync_timeout_s=100.0, timeout_s=100.0)
    return SglangEngine(
        SglangSpec(
            folder=MODEL,
            eos_token_ids=(1,),
            decode=lambda responses: ["" for _ in responses],
            rollout=rollout,
            run_dir=run_dir,
        )
    )


def check(samples: list[Sample], version: int) -> None:
    model = TableModel(VOCAB, seed=100 + version)
    for one in samples:
        torch.testing.assert_close(one.log_probs, expected(model, one))


@pytest.mark.parametrize("via", [SyncVia.tensor, SyncVia.distributed])
def test_weights_reach_a_server_and_survive_its_death(tmp_path: Path, via: SyncVia) -> None:
    async def work() -> None:
        rollout = engine(tmp_path, via)
        await rollout.start()
        try:
            await rollout.load(stream(0))
            (server,) = rollout._fleet.servers.values()
            assert server.pid is not None
            # Most are sure to be under way when it dies, however far behind the server we are.
            late = {"kind": "delay", "times": 150, "seconds": 600.0}
            await rollout.client.ask(rollout.client.pool.endpoints[0], "/fake/fault", late)
            samples = []
            async for one in rollout.generate(requests(200), sampling()):
                if len(samples) == 5:
                    os.killpg(server.pid, signal.SIGKILL)
                samples.append(one)
            assert Counter(s.prompt.id for s in samples) == Counter(f"p{n}" for n in range(200))
            assert all(len(s.response) for s in samples)
            check(samples, 0)
            assert server.num_restarts == 1
            await rollout.load(stream(1))
            check([s async for s in rollout.generate(requests(3), sampling())], 1)
        finally:
            await rollout.close()
        assert not server.alive

    run(work())


def test_a_managed_teacher_comes_back_from_the_dead(tmp_path: Path) -> None:
    async def work() -> None:
        config = SglangManagedTeacher(launch=launch(servers=2), timeout_s=100.0)
        fleet = Fleet.launch("teacher", str(MODEL), config.launch, tmp_path)
        teacher = SglangTeacher(config, fleet)
        await teacher.start()
        try:
            for server in fleet.servers.values():
                assert server.pid is not None
                os.killpg(server.pid, signal.SIGKILL)
            results = await asyncio.gather(*(teacher.score(sample(n)) for n in range(10)))
            for result in results:
                assert result.teacher_status is ScoreStatus.ok
                torch.testing.assert_close(result.teacher_log_probs, expected(TableModel(VOCAB), result))
            assert teacher.metrics().values()["teacher/restarts"] == 2
        finally:
            await teacher.close()

    run(work())


def test_a_server_that_dies_too_often(tmp_path: Path) -> None:
    async def work() -> None:
        fleet = Fleet.launch("rollout", str(MODEL), launch(max_restarts=0), tmp_path)
        await fleet.start()
        (server,) = fleet.servers.values()
        assert server.pid is not None
        os.killpg(server.pid, signal.SIGKILL)
        while server.alive:
            await asyncio.sleep(0.01)
        try:
            with pytest.raises(WorkerError, match="died 1 times"):
                await fleet.ensure(fleet.urls[0])
        finally:
            await fleet.close()

    run(work())


def test_a_server_that_says_nothing_is_killed_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, it lives, and its port takes connections. A proxy is not asked how it is."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    async def work() -> None:
        fleet = Fleet.launch("rollout", str(MODEL), launch(hang_after_s=10.0), tmp_path)
        await fleet.start()
        (server,) = fleet.servers.values()
        try:
            assert server.pid is not None
            # It may be silent for a while.
            os.killpg(server.pid, signal.SIGSTOP)
            await asyncio.sleep(0.5)
            os.killpg(server.pid, signal.SIGCONT)
            await asyncio.sleep(12.0)
            assert not await fleet.ensure(server.spec.url)
            os.killpg(server.pid, signal.SIGSTOP)
            while server.alive:
                await asyncio.sleep(0.05)
            assert await fleet.ensure(server.spec.url)
            assert fleet.num_restarts == 1
        finally:
            await fleet.close()

    run(work())


def test_a_server_that_is_closed_before_it_is_back_stays_closed(tmp_path: Path) -> None:
    async def work() -> None:
        fleet = Fleet.launch("rollout", str(MODEL), launch(), tmp_path)
        await fleet.start()
        (server,) = fleet.servers.values()
        assert server.pid is not None
        os.killpg(server.pid, signal.SIGKILL)
        while server.alive:
            await asyncio.sleep(0.01)
        await server._until_free()
        with socket.socket() as other:
            # Whoever starts the server again has to wait for its port.
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", int(server.spec.url.rpartition(":")[2])))
            other.listen()
            starting = asyncio.ensure_future(fleet.ensure(server.spec.url))
            await asyncio.sleep(0.2)
            assert not starting.done()
            await fleet.close()
        with pytest.raises(WorkerError, match="was closed"):
            await starting
        assert not server.alive

    run(work())


def test_a_server_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    fleet = Fleet.launch("rollout", str(tmp_path / "missing"), launch(), tmp_path)
    with pytest.raises(WorkerError, match=r"rollout server 0 died while starting(.|\n)*missing"):
        run(fleet.start())


def test_a_server_that_is_not_ready_in_time_is_ended(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho still loading $$\nexec sleep 600\n")
    python.chmod(0o755)
    settings = launch(module="anything", python=str(python), start_timeout_s=5.0)
    fleet = Fleet.launch("rollout", str(MODEL), settings, tmp_path)
    with pytest.raises(WorkerError, match=r"rollout server 0 was not ready within 5 s; see .*\nstill load"):
        run(fleet.start())
    assert ended(int((tmp_path / "rollout-0.log").read_text().split()[-1]))


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        fleet = Fleet.launch("rollout", str(MODEL), launch(port=port), tmp_path)
        with pytest.raises(WorkerError, match=f"port {port} of 127.0.0.1 is taken"):
            run(fleet.start())


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    elsewhere = "198.51.100.7"
    with pytest.raises(UserError, match=rf"launch\.host={elsewhere}: nothing can listen there.*127\.0\.0\.1"):
        Fleet.launch("rollout", str(MODEL), launch(host=elsewhere), tmp_path)
    fleet = Fleet.launch("rollout", str(MODEL), launch(host=elsewhere, port=30000), tmp_path)
    with pytest.raises(WorkerError, match=rf"nothing can listen on port 30000 of {elsewhere}.*Set launch\.host"):
        run(fleet.start())


def ended(pid: int, limit_s: float = 300.0) -> bool:
    """Whether a process is gone, or waits to be reaped, within the limit."""
    deadline = time.monotonic() + limit_s
    path = Path(f"/proc/{pid}/cmdline")
    while path.exists() and path.read_bytes():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_servers_die_with_us(tmp_path: Path) -> None:
    """kill -9 of the trainer leaves no server behind."""
    code = f"""
import asyncio, time
from pathlib import Path
from opd_trainer.sglang.config import LaunchConfig
from opd_trainer.sglang.fleet import Fleet
async def main():
    fleet = Fleet.launch("t", {str(MODEL)!r}, LaunchConfig(module={FAKE!r}), Path({str(tmp_path)!r}))
    await fleet.start()
    print(next(iter(fleet.servers.values())).pid, flush=True)
    time.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        trainer.kill()
    assert ended(pid), "the server outlived its trainer"


FAMILY = """
import os, subprocess, time
helper = subprocess.Popen(["sleep", "600"])
print(os.getpid(), helper.pid, flush=True)
time.sleep(600)
"""
"""A server with a process of its own, as SGLang's detokenizer is."""


@pytest.mark.parametrize("killed", ["server", "trainer"])
def test_no_helper_outlives_its_server(killed: str) -> None:
    """Also while the server starts, before it could tell its helpers to follow it."""
    trainer = f"""
import os, subprocess, sys, time
from opd_trainer.cluster import die_with_parent
command = [sys.executable, "-I", die_with_parent.__file__, str(os.getpid()), sys.executable, "-c", {FAMILY!r}]
subprocess.Popen(command, start_new_session=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", trainer], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        server, helper = map(int, process.stdout.readline().split())
        os.kill(server if killed == "server" else process.pid, signal.SIGKILL)
        assert ended(server)
        assert ended(helper)
        process.kill()
