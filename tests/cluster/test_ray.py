import asyncio
import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist

import opd_trainer.cluster.ray as opd_ray
import opd_trainer.cluster.session as opd_session
from opd_trainer.cluster.placement import Demand
from opd_trainer.cluster.ray import RayGroup
from opd_trainer.cluster.session import RaySession
from opd_trainer.errors import PreflightError, TrainingDiverged, WorkerDied, WorkerError

pytestmark = pytest.mark.ray


def make_factory(start_error=None, apart=False):
    """Local, so that Ray pickles the class by value: the test modules cannot be imported by its workers."""

    class Worker:
        def __init__(self, rank, world_size, rendezvous):
            self.rank, self.world_size, self.rendezvous = rank, world_size, rendezvous

        def start(self):
            if start_error is not None and self.rank == 1:
                raise start_error
            if apart:
                return
            dist.init_process_group("gloo", init_method=self.rendezvous, rank=self.rank, world_size=self.world_size)

        def all_reduce(self, value):
            tensor = torch.tensor([float(value)])
            dist.all_reduce(tensor)
            return self.rank, tensor.item()

        def fail(self):
            raise ZeroDivisionError("oh")

        def diverge(self):
            raise TrainingDiverged("step 3")

        def pid(self):
            return os.getpid()

        def variable(self, name):
            return os.environ.get(name)

        def sleep(self, seconds):
            time.sleep(seconds)

        def die(self):
            if self.rank == 0:
                time.sleep(600)
            os._exit(3)

        def close(self):
            if dist.is_initialized():
                dist.destroy_process_group()

    return Worker


numbers = itertools.count()
LIMIT_S = 300.0
"""Of a call; generous, since other work may keep the machine busy."""


def group(session, factory=None, size=2, cpus=1.0, gpus=0.0, **changes):
    demand = Demand(f"trainer {next(numbers)}", size, cpus, gpus)
    return RayGroup(session, factory or make_factory(), demand, **{"timeout_s": LIMIT_S, **changes})


class Worker:
    """Somebody else's actor."""

    def answer(self):
        return "here"


async def expect(exception, match, awaitable):
    with pytest.raises(exception, match=match):
        await awaitable


async def what_is_not_there_is_refused(session, monkeypatch):
    too_many = group(session, cpus=3.0)
    await expect(PreflightError, "workers of 3 CPU need 6 CPUs.*, and there are 1 on the node", too_many.start())
    no_gpu = group(session, cpus=0.5, gpus=1.0)
    await expect(PreflightError, "workers of 1 GPU need 2 GPUs.*, and there are 0 on the node", no_gpu.start())
    actor: Any = ray.remote(num_cpus=1)(Worker)
    stranger = actor.remote()
    assert ray.get(stranger.answer.remote()) == "here"
    with monkeypatch.context() as patch:
        # Not at once: what Ray says of free resources is a moment old.
        patch.setattr(opd_session, "FREE_TIMEOUT_S", 2.0)
        await expect(PreflightError, "has 4 CPUs and 0 GPUs, of which 0 CPUs", group(session, size=1).start())
    ray.kill(stranger)


async def deaths_are_noticed_and_replaced(session):
    idle = group(session, env={"OPD_TEST": "told"})
    await idle.start()
    assert await idle.call("variable", "OPD_TEST") == ["told", "told"]
    watching = asyncio.ensure_future(idle.watch())
    await asyncio.sleep(opd_ray.WATCH_S + 1)
    assert not watching.done()
    os.kill((await idle.call("pid"))[1], signal.SIGKILL)
    await expect(WorkerDied, "a worker died", asyncio.wait_for(watching, LIMIT_S))
    await idle.close()

    together = group(session)
    await together.start()
    os.kill((await together.call("pid"))[1], signal.SIGKILL)
    await expect(WorkerDied, "a worker died in all_reduce", together.call("all_reduce", 1))
    await together.close()

    alone = group(session, make_factory(apart=True))
    await alone.start()
    first, second = await alone.call("pid")
    os.kill(second, signal.SIGKILL)
    await expect(WorkerDied, "a worker died in pid", alone.call("pid"))
    assert await alone.replace_dead() == [1]
    assert (await alone.call("pid"))[0] == first
    await alone.close()


def test_ray_groups(monkeypatch):
    """One Ray for all cases: starting it costs seconds."""
    token = Path.home() / ".ray" / "auth_token"
    token_before = token.exists()
    monkeypatch.setattr(opd_session, "FREE_TIMEOUT_S", LIMIT_S)

    async def run():
        session = RaySession(None, 4)
        keeper = group(session, size=1)
        await keeper.start()
        temp_dir = Path(str(session._temp_dir))
        assert (temp_dir / "session_latest").exists()

        workers = group(session)
        await workers.start()
        assert workers.size == 2
        assert await workers.call("all_reduce", 2) == [(0, 4.0), (1, 4.0)]
        assert await workers.call_each("all_reduce", [(1,), (5,)]) == [(0, 6.0), (1, 6.0)]
        await what_is_not_there_is_refused(session, monkeypatch)
        await expect(TrainingDiverged, "step 3", workers.call("diverge"))
        await expect(WorkerError, "unusable", workers.call("all_reduce", 1))
        await workers.close()
        await workers.close()
        await expect(WorkerError, "closed", workers.call("all_reduce", 1))

        raising = group(session)
        await raising.start()
        await expect(WorkerError, "a worker failed in fail(?s:.*)ZeroDivisionError: oh", raising.call("fail"))
        await raising.close()

        dying = group(session)
        await dying.start()
        # Noticed before the other one would answer, and before the time of the call is over.
        await expect(WorkerDied, "a worker died in die", dying.call("die"))
        await dying.close()

        await deaths_are_noticed_and_replaced(session)
        await expect(
            WorkerError,
            "failed in start(?s:.*)no memory",
            group(session, make_factory(RuntimeError("no memory"))).start(),
        )

        slow = group(session)
        await slow.start()
        slow._timeout_s = 0.5
        await expect(WorkerError, "no answer to sleep within 0.5 s", slow.call("sleep", 30))
        await slow.close()

        assert ray.is_initialized()
        assert await keeper.call("all_reduce", 1) == [(0, 1.0)]
        await keeper.close()
        assert not ray.is_initialized()
        assert not temp_dir.exists()

    asyncio.run(run())
    assert token.exists() == token_before
