"""Weights and memory of SGLang servers that generate, the fake one in their place."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opd_trainer.errors import OpdError, UserError, WorkerError
from opd_trainer.rollout.config import SyncVia
from opd_trainer.types import WeightStream
from tests.rollout.servers import IN_ONE_PROCESS, collect, engine, log_probs, run, stream, table
from tests.sglang.serving import fake, sampling


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
                    torch.testing.assert_close(sample.log_probs, log_probs(sample, table(version), 0.7))
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
            torch.testing.assert_close(sample.log_probs, log_probs(sample, table(0)))
            assert not server.state.updating
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
                torch.testing.assert_close(sample.log_probs, log_probs(sample, table(3)))
            assert first.state.weight_version == "3"
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
                torch.testing.assert_close(sample.log_probs, log_probs(sample, table(0)))
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
                torch.testing.assert_close(sample.log_probs, log_probs(sample, table(1)))
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
                torch.testing.assert_close(sample.log_probs, log_probs(sample, table(1)))
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
            while not server.state.running:
                await asyncio.sleep(0.01)
            async with rollout.asleep():
                assert stray.done()
                assert server.state.released
                await rollout.load(stream(1))
            assert len(await collect(rollout, 1)) == 1
            await rollout.close()

    run(work())


def test_weights_pass_through_the_folder_that_is_named(tmp_path: Path) -> None:
    async def work() -> None:
        async with fake() as server:
            shared = tmp_path / "shared"
            rollout = engine(tmp_path, server, sync_via=SyncVia.disk, sync_dir=str(shared))
            await rollout.start()
            for version in (0, 1):
                await rollout.load(stream(version))
                # One at a time: versions of a large model would fill the disk.
                assert [folder.name for folder in shared.iterdir()] == [f"version-{version}"]
            (sample,) = await collect(rollout, 1)
            torch.testing.assert_close(sample.log_probs, log_probs(sample, table(1)))
            await rollout.close()

    run(work())


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.2:9", r"127\.0\.0\.2 is another machine.*rollout\.sync_via=distributed or disk"),
        ("http://[::1]:9", r"no way leads to the server at '::1'.*Set rollout\.urls"),
    ],
)
def test_servers_that_weights_do_not_reach(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        engine(tmp_path, urls=[url])
