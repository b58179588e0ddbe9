import asyncio

import pytest

from opd_trainer.cluster.inprocess import InProcessGroup
from opd_trainer.errors import TrainingDiverged, WorkerError


class Worker:
    def __init__(self, rank, world_size, rendezvous):
        self.place = (rank, world_size, rendezvous)
        self.started = self.closed = 0

    def start(self):
        self.started += 1

    def add(self, a, b):
        return a + b

    def fail(self):
        raise ZeroDivisionError("oh")

    def diverge(self):
        raise TrainingDiverged("step 3")

    def close(self):
        self.closed += 1


class Unstartable(Worker):
    def start(self):
        raise RuntimeError("no memory")


def test_life_cycle_and_calls():
    async def run():
        group = InProcessGroup(Worker)
        with pytest.raises(WorkerError, match="not started"):
            await group.call("add", 1, 2)
        await group.start()
        worker = group.worker
        assert (group.size, worker.started) == (1, 1)
        assert worker.place[:2] == (0, 1)
        assert worker.place[2].startswith("tcp://")
        assert await group.call("add", 1, 2) == [3]
        assert await group.call_each("add", [(3, 4)]) == [7]
        await group.close()
        await group.close()
        assert worker.closed == 1
        with pytest.raises(WorkerError, match="closed"):
            await group.call("add", 1, 2)

    asyncio.run(run())


def test_errors_of_the_worker():
    async def run():
        group = InProcessGroup(Worker)
        await group.start()
        with pytest.raises(WorkerError, match="worker 0 failed in fail: ZeroDivisionError: oh") as caught:
            await group.call("fail")
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        with pytest.raises(TrainingDiverged, match="step 3"):
            await group.call("diverge")
        await group.close()

    asyncio.run(run())


def test_a_worker_that_fails_to_start_is_closed():
    made = []

    def make(*place):
        made.append(Unstartable(*place))
        return made[0]

    with pytest.raises(WorkerError, match="no memory"):
        asyncio.run(InProcessGroup(make).start())
    assert made[0].closed == 1
