import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest
import torch

from opd_trainer.cluster.inprocess import InProcessGroup
from opd_trainer.errors import OpdError, WorkerDied
from opd_trainer.rollout.group import EngineGroup, deal
from opd_trainer.types import Sample
from tests.rollout.models import (
    CONFIGS,
    by_request,
    finish,
    loaded_worker,
    random_model,
    requests,
    sampling,
    spec,
    stream,
    tensors,
)


class Workers:
    """Several workers side by side, called one after the other."""

    def __init__(self, make_worker: Callable[[int, int, str], Any], size: int) -> None:
        self.workers = [make_worker(rank, size, "") for rank in range(size)]
        self.calls: list[str] = []

    @property
    def size(self) -> int:
        return len(self.workers)

    async def start(self) -> None:
        await self.call("start")

    async def call(self, method: str, *args: Any) -> list[Any]:
        return await self.call_each(method, [args] * self.size)

    async def call_each(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        self.calls.append(method)
        return [getattr(worker, method)(*own) for worker, own in zip(self.workers, args, strict=True)]

    async def close(self) -> None:
        await self.call("close")


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(CONFIGS["llama"])


async def generate(engine: EngineGroup, model: Any, siblings: int = 2) -> list[Sample]:
    await engine.start()
    await engine.load(stream(tensors(model), version=3))
    samples = [sample async for sample in engine.generate(requests(siblings=siblings), sampling())]
    await engine.close()
    return samples


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_any_number_of_workers_gives_the_same_samples(model: Any, size: int):
    found = by_request(asyncio.run(generate(EngineGroup(Workers(spec(model.config).make_worker, size)), model)))
    expected = by_request(finish(loaded_worker(model), requests(), sampling()))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].response, expected[key].response) for key in expected)
    assert {sample.version for sample in found.values()} == {3}


def test_it_runs_on_the_group_that_ships(model: Any):
    assert len(asyncio.run(generate(EngineGroup(InProcessGroup(spec(model.config).make_worker)), model))) == 12


def test_samples_stream_before_the_last_is_done(model: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opd_trainer.rollout.group.POLL_SECONDS", 0.0)
    group = Workers(spec(model.config, batch_size=2).make_worker, 2)
    asyncio.run(generate(EngineGroup(group), model))
    assert group.calls.count("poll") > 20


def test_an_iterator_that_is_closed_early_frees_the_workers(model: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opd_trainer.rollout.group.POLL_SECONDS", 0.0)

    async def run() -> int:
        engine = EngineGroup(Workers(spec(model.config).make_worker, 2))
        await engine.start()
        await engine.load(stream(tensors(model), version=3))
        async with aclosing(engine.generate(requests(), sampling())) as samples:
            await anext(samples)
            with pytest.raises(OpdError, match="while it generates"):
                await engine.load(stream(tensors(model), version=4))
        return len([sample async for sample in engine.generate(requests(), sampling())])

    assert asyncio.run(run()) == 12


@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_shares_are_complete_and_of_equal_cost(workers: int):
    asked = requests(prompts=10, siblings=3)
    shares = deal(asked, workers, max_response_tokens=5)
    assert len(shares) == workers
    assert sorted(id(request) for share in shares for request in share) == sorted(id(request) for request in asked)
    costs = [sum(len(request.prompt.tokens) + 5 for request in share) for share in shares]
    assert max(costs) - min(costs) <= 2 * max(len(request.prompt.tokens) + 5 for request in asked)


def test_siblings_share_a_worker_where_they_can():
    shares = deal(requests(prompts=10, siblings=4), 2, max_response_tokens=5)
    split = {request.prompt.id for request in shares[0]} & {request.prompt.id for request in shares[1]}
    assert len(split) <= 1


def test_no_requests_make_empty_shares():
    assert deal([], 3, max_response_tokens=5) == [[], [], []]


class Mortal(Workers):
    """Workers of which one dies at a given call; it comes back empty."""

    def __init__(self, make_worker: Callable[[int, int, str], Any], size: int, *, dies_at: str, call: int) -> None:
        super().__init__(make_worker, size)
        self.make_worker = make_worker
        self.dies_at, self.left = dies_at, call

    async def call_each(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        if method == self.dies_at:
            self.left -= 1
            if self.left == 0:
                # The first worker has done its part by the time that the last one dies.
                getattr(self.workers[0], method)(*args[0])
                raise WorkerDied("rollout: a worker died")
        return await super().call_each(method, args)

    async def replace_dead(self) -> list[int]:
        self.workers[-1] = self.make_worker(self.size - 1, self.size, "")
        self.workers[-1].start()
        return [self.size - 1]


AT = [("begin", 1), ("poll", 1), ("poll", 2), ("load_bucket", 2), ("commit", 1)]


@pytest.mark.parametrize(("dies_at", "call"), AT)
def test_a_dead_worker_does_not_show_in_the_samples(
    model: Any, monkeypatch: pytest.MonkeyPatch, dies_at: str, call: int
):
    monkeypatch.setattr("opd_trainer.rollout.group.POLL_SECONDS", 0.0)
    make_worker = spec(model.config, batch_size=2).make_worker
    expected = by_request(asyncio.run(generate(EngineGroup(Workers(make_worker, 2)), model)))
    mortal = Mortal(make_worker, 2, dies_at=dies_at, call=call)
    engine = EngineGroup(mortal, replace_dead=mortal.replace_dead, max_restarts=1)
    samples = asyncio.run(generate(engine, model))
    found = by_request(samples)
    assert len(samples) == len(found) == len(expected)
    assert all(torch.equal(found[key].response, expected[key].response) for key in expected)
    assert {sample.version for sample in samples} == {3}
    assert mortal.left <= 0


def test_deaths_are_counted(model: Any):
    mortal = Mortal(spec(model.config).make_worker, 2, dies_at="begin", call=1)
    with pytest.raises(WorkerDied, match="a worker died"):
        asyncio.run(generate(EngineGroup(mortal, replace_dead=mortal.replace_dead, max_restarts=0), model))
