import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from opd_trainer.errors import OpdError, WorkerError
from opd_trainer.rollout.config import SglangRollout, SyncVia
from opd_trainer.rollout.sglang import requests as requests_module
from opd_trainer.rollout.sglang.engine import SglangEngine, SglangSpec
from opd_trainer.sglang.fake_model import TableModel
from opd_trainer.sglang.faults import Fault
from opd_trainer.types import Finish, Sample, Sampling, WeightStream
from tests.sglang.serving import VOCAB, Served, fake, requests, sampling

Result = TypeVar("Result")


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 300))


def table(version: int) -> Tensor:
    return TableModel(VOCAB, seed=100 + version).table


def stream(version: int) -> WeightStream:
    async def buckets() -> AsyncIterator[list[tuple[str, Tensor]]]:
        yield [("table", table(version))]

    return WeightStream(version=version, buckets=buckets())


def engine(folder: Path, *servers: Served, **changes: Any) -> SglangEngine:
    rollout = SglangRollout(**{"urls": [s.url for s in servers], "timeout_s": 20.0, "sync_timeout_s": 20.0, **changes})
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    return SglangEngine(
        SglangSpec(
            folder=folder / "model",
            eos_token_ids=(1,),
            decode=lambda responses: [" ".join(map(str, response)) for response in responses],
            rollout=rollout,
            run_dir=folder,
        )
    )


async def collect(rollout: SglangEngine, count: int, how: Sampling | None = None) -> list[Sample]:
    return [sample async for sample in rollout.generate(requests(count), how or sampling())]


def log_probs(sample: Sample, version: int, temperature: float = 1.0) -> Tensor:
    tokens = torch.cat([sample.prompt.tokens[-1:], sample.response])
    rows = (table(version)[tokens[:-1]] / temperature).log_softmax(-1)
    return rows.gather(1, sample.response[:, None])[:, 0]


IN_ONE_PROCESS = (SyncVia.tensor, SyncVia.disk)
"""A process group needs two; see tests/sglang/test_managed.py."""


@pytest.mark.parametrize("via", IN_ONE_PROCESS)
@pytest.mark.parametrize("sessions", [True, False], ids=["new_api", "old_api"])
def test_samples_come_from_the_weights_that_were_loaded(tmp_path: Path, via: SyncVia, sessions: bool) -> None:
    async def work() -> None:
        async with fake(sessions=sessions) as first, fake(sessions=sessions) as second:
            rollout = engine(tmp_path, first, second, sync_via=via)
            await rollout.start()
            for version in (0, 1):
                await rollout.load(stream(version))
                samples = await collect(rollout, 6, sampling(temperature=0.7))
                assert len(samples) == 6
                for sample in samples:
                    assert sample.version == version
                    torch.testing.assert_close(sample.log_probs, log_probs(sample, version, 0.7))
            assert first.state.weight_version == second.state.weight_version == "1"
            for server in (first, second):
                calls = server.state.calls
                assert ("/begin_weight_update" in calls) == (sessions and via is not SyncVia.disk)
                assert calls.index("/pause_generation") < calls.index("/flush_cache")
                assert calls.index("/flush_cache") < calls.index("/continue_generation")
            await rollout.close()

    run(work())


@pytest.mark.parametrize("path", ["/begin_weight_update", "/update_weights_from_tensor", "/flush_cache"])
def test_a_transfer_that_broke_off_is_made_again(tmp_path: Path, path: str) -> None:
    async def work() -> None:
        async with fake() as server:
            rollout = engine(tmp_path, server)
            await rollout.start()
            server.state.breaking.add(path)
            await rollout.load(stream(0))
            (sample,) = await collect(rollout, 1)
            torch.testing.assert_close(sample.log_probs, log_probs(sample, 0))
            assert not server.state.updating
            await rollout.close()

    run(work())


def test_a_sample_depends_on_its_request_alone(tmp_path: Path) -> None:
    async def work() -> None:
        async with fake() as server:
            rollout = engine(tmp_path, server)
            await rollout.start()
            await rollout.load(stream(0))
            many = {s.prompt.id: s.response.tolist() for s in await collect(rollout, 8)}
            few = {s.prompt.id: s.response.tolist() for s in await collect(rollout, 3)}
            assert few == {name: many[name] for name in few}
            await rollout.close()

    run(work())


def test_finish_reasons_stop_tokens_and_texts(tmp_path: Path) -> None:
    async def work() -> None:
        async with fake() as server:
            rollout = engine(tmp_path, server)
            await rollout.start()
            await rollout.load(stream(0))
            for sample in await collect(rollout, 20, sampling(stop_token_ids=(3, 4, 5))):
                ids = sample.response.tolist()
                stopped = ids[-1] in (1, 3, 4, 5)
                assert sample.finish is (Finish.stop if stopped else Finish.length)
                assert not {1, 3, 4, 5} & set(ids[:-1])
                assert stopped or len(ids) == 12
                assert sample.text == " ".join(map(str, ids))
                assert sample.topk is None
            await rollout.close()

    run(work())


def test_candidates(tmp_path: Path) -> None:
    async def work() -> None:
        async with fake() as server:
            rollout = engine(tmp_path, server)
            await rollout.start()
            await rollout.load(stream(0))
            for sample in await collect(rollout, 3, sampling(log_prob_top_k=5)):
                before = torch.cat([sample.prompt.tokens[-1:], sample.response[:-1]])
                values, ids = table(0)[before].log_softmax(-1).topk(5)
                assert sample.topk is not None
                torch.testing.assert_close(sample.topk.log_probs, values)
                assert torch.equal(sample.topk.ids, ids)
            await rollout.close()

    run(work())


def test_samples_arrive_while_others_are_generated(tmp_path: Path) -> None:
    async def work() -> None:
        async with fake() as server:
            rollout = engine(tmp_path, server)
            await rollout.start()
            await rollout.load(stream(0))
            server.state.faults.add(Fault.delay, seconds=1.0)
            loop = asyncio.get_running_loop()
            start = loop.time()
            arrivals = [loop.time() - start async for _ in rollout.generate(requests(5), sampling())]
            assert arrivals[0] < 0.8
            assert arrivals[-1] >= 1.0
            await rollout.close()

    run(work())


@pytest.mark.parametrize("keep", [True, False])
def test_stragglers_are_aborted(tmp_path: Path, keep: bool) -> None:
    async def work() -> None:
        async with fake(token_s=0.02) as server:
            rollout = engine(tmp_path, server, straggler_after_s=0.5, keep_partial=keep)
            await rollout.start()
            await rollout.load(stream(0))
            samples = await collect(rollout, 4, sampling(max_response_tokens=2000))
            assert len(samples) == 4
            late = [sample for sample in samples if sample.finish is not Finish.stop]
            assert late
            for sample in late:
                assert sample.finish is (Finish.length if keep else Finish.abort)
                assert 0 < len(sample.response) < 100
                torch.testing.assert_close(sample.log_probs, log_probs(sample, 0))
            await rollout.close()

    run(work())


def test_stragglers_that_still_wait_for_their_turn_are_aborted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_module, "ABORT_GRACE_S", 1e9)
    monkeypatch.setattr(requests_module, "ABORT_AGAIN_S", 0.2)

    async def work() -> None:
        async with fake(token_s=0.5) as server:
            rollout = engine(tmp_path, server, straggler_after_s=0.1, concurrency=1, timeout_s=300.0)
            await rollout.start()
            await rollout.load(stream(0))
            samples = await collect(rollout, 3, sampling(max_response_tokens=2000))
            assert Counter(sample.prompt.id for sample in samples) == Counter(f"p{n}" for n in range(3))
            assert server.state.calls.count("/abort_request") > 1
            await rollout.close()

    run(work())


@pytest.mark.parametrize("fault", [Fault.error_500, Fault.reset, Fault.cut])
def test_a_failed_request_is_tried_again_and_gives_one_sample(tmp_path: Path, fault: Fault) -> None:
    async def work() -> None:
        async with fake() as server:
            rollout = engine(tmp_path, server)
            await rollout.start()
            await rollout.load(stream(0))
            plain = {s.prompt.id: s.response.tolist() for s in await collect(rollout, 6)}
            server.state.faults.add(fault, times=2)
            samples = await collect(rollout, 6)
            assert {s.prompt.id: s.response.tolist() for s in samples} == plain
            assert rollout.metrics().values()["rollout/retries"] == 2
            await rollout.close()

    run(work())


@pytest.mark.parametrize("via", IN_ONE_PROCESS)
def test_a_server_that_lost_its_weights_gets_them_again(tmp_path: Path, via: SyncVia) -> None:
    async def work() -> None:
        async with fake() as first, fake() as second:
            rollout = engine(tmp_path, first, second, sync_via=via)
            await rollout.start()
            await rollout.load(stream(3))
            first.state.restart()
            samples = await collect(rollout, 8)
            assert Counter(s.prompt.id for s in samples) == Counter(f"p{n}" for n in range(8))
            for sample in samples:
                torch.testing.assert_close(sample.log_probs, log_probs(sample, 3))
            assert first.state.weight_version == "3"
            await rollout.close()

    run(work())


def test_a_server_that_is_gone_for_good(tmp_path: Path) -> None:
    async def work() -> None:
        async with fake() as server:
            rollout = engine(tmp_path, server, attempts=2)
            await rollout.start()
            await rollout.load(stream(0))
            await server.down()
            try:
                with pytest.raises(WorkerError, match=r"4 of 4 requests unanswered.*max_failed_fraction"):
                    await collect(rollout, 4)
            finally:
                await rollout.close()

    run(work())


def test_a_refused_request_stops_the_run(tmp_path: Path) -> None:
    async def work() -> None:
        async with fake() as server:
            rollout = engine(tmp_path, server)
            await rollout.start()
            await rollout.load(stream(0))
            try:
                with pytest.raises(WorkerError, match="context length"):
                    await collect(rollout, 4, sampling(max_response_tokens=100_000))
            finally:
                await rollout.close()

    run(work())


def test_weights_come_first(tmp_path: Path) -> None:
    async def work() -> None:
        async with fake() as server:
            rollout = engine(tmp_path, server)
            await rollout.start()
            try:
                with pytest.raises(OpdError, match="load must succeed"):
                    await collect(rollout, 1)
            finally:
                await rollout.close()

    run(work())


def test_a_tensor_that_does_not_fit_is_reported(tmp_path: Path) -> None:
    async def buckets() -> AsyncIterator[list[tuple[str, Tensor]]]:
        yield [("nonsense", torch.zeros(3))]

    async def work() -> None:
        async with fake() as server:
            rollout = engine(tmp_path, server)
            await rollout.start()
            try:
                with pytest.raises(WorkerError, match=r"version 1.*nonsense"):
                    await rollout.load(WeightStream(version=1, buckets=buckets()))
            finally:
                await rollout.close()

    run(work())


def test_the_learner_may_write_on(tmp_path: Path) -> None:
    """A server that asks again gets what was loaded, not what the learner's tensors hold by then."""
    live = table(0).clone()

    async def buckets() -> AsyncIterator[list[tuple[str, Tensor]]]:
        yield [("table", live)]

    async def work() -> None:
        async with fake() as server:
            rollout = engine(tmp_path, server)
            await rollout.start()
            await rollout.load(WeightStream(version=0, buckets=buckets()))
            assert not live.is_shared()
            live.zero_()
            server.state.restart()
            for sample in await collect(rollout, 3):
                torch.testing.assert_close(sample.log_probs, log_probs(sample, 0))
            await rollout.close()

    run(work())


def test_memory_is_free_while_the_student_trains(tmp_path: Path) -> None:
    async def work() -> None:
        async with fake() as first, fake() as second:
            rollout = engine(tmp_path, first, second, release_memory=True)
            await rollout.start()
            await rollout.load(stream(0))
            assert len(await collect(rollout, 4)) == 4
            async with rollout.asleep():
                for server in (first, second):
                    assert server.state.released == {"kv_cache", "weights"}
                with pytest.raises(OpdError, match="load must succeed"):
                    await collect(rollout, 1)
                await rollout.load(stream(1))
                for server in (first, second):
                    # The cache waits until the student's memory is free.
                    assert server.state.released == {"kv_cache"}
            assert not first.state.released
            for sample in await collect(rollout, 4):
                torch.testing.assert_close(sample.log_probs, log_probs(sample, 1))
            await rollout.close()

    run(work())


def test_memory_is_kept_unless_asked_for(tmp_path: Path) -> None:
    async def work() -> None:
        async with fake() as server:
            rollout = engine(tmp_path, server)
            await rollout.start()
            await rollout.load(stream(0))
            async with rollout.asleep():
                assert len(await collect(rollout, 1)) == 1
            assert "/release_memory_occupation" not in server.state.calls
            await rollout.close()

    run(work())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_server_that_dies_asleep_comes_back_awake(tmp_path: Path, when: str) -> None:
    """Before or after it got its new weights; a new process knows nothing of memory that the old one gave back."""

    async def work() -> None:
        async with fake() as server:
            rollout = engine(tmp_path, server, release_memory=True)
            await rollout.start()
            await rollout.load(stream(0))
            async with rollout.asleep():
                if when == "before":
                    server.state.restart()
                await rollout.load(stream(1))
                if when == "after":
                    server.state.restart()
            for sample in await collect(rollout, 3):
                torch.testing.assert_close(sample.log_probs, log_probs(sample, 1))
            await rollout.close()

    run(work())


def test_a_request_under_way_is_waited_for_before_memory_is_given_back(tmp_path: Path) -> None:
    """SGLang dies of being told to while something runs; a straggler that was given up may still."""

    async def work() -> None:
        async with fake(token_s=0.1) as server:
            rollout = engine(tmp_path, server, release_memory=True)
            await rollout.start()
            await rollout.load(stream(0))
            stray = asyncio.create_task(
                rollout.client.ask(
                    rollout.client.pool.endpoints[0],
                    "/generate",
                    {"input_ids": [3, 4], "sampling_params": {"max_new_tokens": 8, "ignore_eos": True}},
                )
            )
            await asyncio.sleep(0.2)
            async with rollout.asleep():
                assert stray.done()
                assert server.state.released
                await rollout.load(stream(1))
            assert len(await collect(rollout, 1)) == 1
            await rollout.close()

    run(work())
