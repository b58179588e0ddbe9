import asyncio
from contextlib import aclosing
from typing import Any

import pytest
import torch

from opd_trainer.errors import OpdError, ShapeMismatch
from opd_trainer.rollout.embedded.engine import EmbeddedEngine
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


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(CONFIGS["qwen2"])


async def started(model: Any) -> EmbeddedEngine:
    engine = EmbeddedEngine(spec(model.config, batch_size=5))
    await engine.start()
    await engine.load(stream(tensors(model), version=3))
    return engine


def test_it_gives_the_samples_of_its_worker(model: Any):
    async def run() -> list[Any]:
        engine = await started(model)
        samples = [sample async for sample in engine.generate(requests(), sampling())]
        await engine.close()
        await engine.close()
        return samples

    found = by_request(asyncio.run(run()))
    expected = by_request(finish(loaded_worker(model), requests(), sampling()))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].response, expected[key].response) for key in expected)
    assert {sample.version for sample in found.values()} == {3}


def test_samples_stream_and_others_run_between_steps(model: Any):
    async def run() -> tuple[int, list[int]]:
        engine, turns = await started(model), 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        seen = [turns async for _ in engine.generate(requests(), sampling())]
        task.cancel()
        return turns, seen

    turns, seen = asyncio.run(run())
    assert turns > 20
    assert len(set(seen)) > 3


def test_an_iterator_that_is_closed_early_frees_the_engine(model: Any):
    async def run() -> int:
        engine = await started(model)
        async with aclosing(engine.generate(requests(), sampling())) as samples:
            await anext(samples)
            with pytest.raises(OpdError, match="while it generates"):
                await anext(engine.generate(requests(), sampling()))
            with pytest.raises(OpdError, match="while it generates"):
                await engine.load(stream(tensors(model), version=4))
            await anext(samples)
        await engine.load(stream(tensors(model), version=5))
        versions = {sample.version async for sample in engine.generate(requests(), sampling())}
        return versions.pop()

    assert asyncio.run(run()) == 5


def test_a_stream_that_lacks_tensors_is_refused(model: Any):
    async def run() -> None:
        engine = await started(model)
        await engine.load(stream(tensors(model)[1:], version=4))

    with pytest.raises(ShapeMismatch, match=r"model\.embed_tokens\.weight"):
        asyncio.run(run())
