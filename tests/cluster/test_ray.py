import asyncio
import os
import time
from pathlib import Path

import pytest
import ray
import torch
import torch.distributed as dist

import opd_trainer.cluster.ray as opd_ray
from opd_trainer.cluster.ray import RayGroup, RaySession
from opd_trainer.errors import PreflightError, TrainingDiverged, WorkerError


def make_factory(start_error=None):
    """Local, so that Ray pickles the class by value: the test modules cannot be imported by its workers."""

    class Worker:
        def __init__(self, rank, world_size, rendezvous):
            self.rank, self.world_size, self.rendezvous = rank, world_size, rendezvous

        def start(self):
            if start_error is not None and self.rank == 1:
                raise start_error
            dist.init_process_group("gloo", init_method=self.rendezvous, rank=self.rank, world_size=self.world_size)

        def all_reduce(self, value):
            tensor = torch.tensor([float(value)])
            dist.all_reduce(tensor)
            return self.rank, tensor.item()

        def fail(self):
            raise ZeroDivisionError("oh")

        def diverge(self):
            raise TrainingDiverged("step 3")

        def sleep(self, seconds):
            time.sleep(seconds)

        def die(self):
            if self.rank == 0:
                time.sleep(60)
            os._exit(3)

        def close(self):
            if dist.is_initialized():
                dist.destroy_process_group()

    return Worker


def group(session, factory=None, **changes):
    settings = {"name": "trainer", "size": 2, "cpus_per_worker": 1.0, "gpus_per_worker": 0.0, "timeout_s": 60.0}
    return RayGroup(session, factory or make_factory(), **{**settings, **changes})


async def expect(exception, match, awaitable):
    with pytest.raises(exception, match=match):
        await awaitable


def test_ray_groups(monkeypatch):
    """One Ray for all cases: starting it costs seconds."""
    token = Path.home() / ".ray" / "auth_token"
    token_before = token.exists()

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
        too_many = group(session, cpus_per_worker=3.0)
        await expect(PreflightError, "2 workers of 3 CPU need 6, and there are 4", too_many.start())
        no_gpu = group(session, cpus_per_worker=0.5, gpus_per_worker=1.0)
        await expect(PreflightError, "2 workers of 1 GPU need 2, and there are 0", no_gpu.start())
        monkeypatch.setattr(opd_ray, "FREE_TIMEOUT_S", 0.2)
        busy = group(session, cpus_per_worker=2.0)
        await expect(PreflightError, "2 workers of 2 CPU need 4, and there are 1", busy.start())
        monkeypatch.undo()
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
        began = time.monotonic()
        await expect(WorkerError, "a worker died in die", dying.call("die"))
        assert time.monotonic() - began < 30
        await dying.close()

        await expect(
            WorkerError,
            "failed in start(?s:.*)no memory",
            group(session, make_factory(RuntimeError("no memory"))).start(),
        )

        slow = group(session, timeout_s=20.0)
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
