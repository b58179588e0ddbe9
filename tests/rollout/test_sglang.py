"""Responses from SGLang servers, the fake one in their place: what a sample is, and what becomes of a request."""

from collections import Counter
from contextlib import aclosing
from pathlib import Path

import pytest
import torch

from opd_trainer.errors import WorkerError
from opd_trainer.rollout.sglang import requests as requests_module
from opd_trainer.sglang.faults import Fault
from opd_trainer.types import Finish
from tests.rollout.servers import LIMIT_S, collect, engine, log_probs, run, stream, table
from tests.sglang.serving import fake, requests, sampling


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
            rollout = engine(tmp_path, server, timeout_s=1000.0)
            await rollout.start()
            await rollout.load(stream(0))
            # Nobody here waits for so long.
            server.state.faults.add(Fault.delay, seconds=2 * LIMIT_S)
            async with aclosing(rollout.generate(requests(5), sampling())) as samples:
                early = {(await anext(samples)).prompt.id for _ in range(4)}
            assert len(early) == 4
            await rollout.close()

    run(work())


@pytest.mark.parametrize("keep", [True, False])
def test_stragglers_are_aborted(tmp_path: Path, keep: bool) -> None:
    endless = table(0)
    endless[:, 1] = -1e9

    async def work() -> None:
        async with fake(token_s=0.02) as server:
            rollout = engine(tmp_path, server, straggler_after_s=1.0, keep_partial=keep)
            await rollout.start()
            await rollout.load(stream(0, endless))
            samples = await collect(rollout, 4, sampling(max_response_tokens=4000))
            assert len(samples) == 4
            for sample in samples:
                assert sample.finish is (Finish.length if keep else Finish.abort)
                assert 0 < len(sample.response) < 4000
                torch.testing.assert_close(sample.log_probs, log_probs(sample, endless))
            await rollout.close()

    run(work())


def test_stragglers_that_still_wait_for_their_turn_are_aborted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_module, "ABORT_GRACE_S", 1e9)
    monkeypatch.setattr(requests_module, "ABORT_AGAIN_S", 0.2)

    async def work() -> None:
        async with fake(token_s=0.5) as server:
            rollout = engine(tmp_path, server, straggler_after_s=0.1, concurrency=1)
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


def test_requests_that_may_be_lost_are_dropped_and_counted(tmp_path: Path) -> None:
    async def work() -> None:
        async with fake() as server:
            rollout = engine(tmp_path, server, attempts=1, max_failed_fraction=1.0)
            await rollout.start()
            await rollout.load(stream(0))
            await server.down()
            samples = await collect(rollout, 4)
            assert [(sample.finish, len(sample.response)) for sample in samples] == [(Finish.abort, 0)] * 4
            assert rollout.metrics().values()["rollout/unanswered"] == 4
            assert rollout.metrics().values()["rollout/unanswered"] == 0
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
