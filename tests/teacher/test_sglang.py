import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
import torch

from opd_trainer.errors import TeacherError
from opd_trainer.sglang.faults import Fault
from opd_trainer.sglang.fleet import Fleet
from opd_trainer.teacher.config import OnFailure, SglangExternalTeacher
from opd_trainer.teacher.sglang import SglangTeacher
from opd_trainer.types import Sample, ScoreStatus
from tests.sglang.serving import VOCAB, expected, fake, prompt, sample, table_model

Result = TypeVar("Result")


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 300))


def config(**changes: Any) -> SglangExternalTeacher:
    return SglangExternalTeacher(**{"timeout_s": 100.0, "attempts": 1, "max_failed_fraction": 1.0, **changes})


async def scored(samples: list[Sample], settings: SglangExternalTeacher, urls: list[str], **more: Any) -> Any:
    teacher = SglangTeacher(settings, Fleet(urls), **more)
    await teacher.start()
    try:
        results = await asyncio.gather(*(teacher.score(one) for one in samples))
        return results, teacher.metrics().values()
    finally:
        await teacher.close()


def test_log_probs_are_those_of_the_response() -> None:
    samples = [sample(number, length) for number, length in enumerate((7, 1, 30, 2))]

    async def work() -> tuple[list[Sample], dict[str, float]]:
        async with fake() as server:
            return await scored(samples, config(), [server.url + "/generate"])

    results, metrics = run(work())
    for result in results:
        torch.testing.assert_close(result.teacher_log_probs, expected(table_model(), result))
        assert result.teacher_status is ScoreStatus.ok
        assert result.teacher_topk is None
    assert metrics["teacher/failed_fraction"] == 0.0
    assert metrics["teacher/status/ok"] == 4
    assert metrics["teacher/latency_s"] > 0
    assert metrics["teacher/cached_token_fraction"] == 0.0


def test_the_last_id_of_the_vocabulary_comes_back_as_0() -> None:
    """SGLang takes it for the placeholder of an image; its log-prob is right all the same."""
    last = torch.tensor([4, VOCAB - 1, 9, VOCAB - 1])

    async def work() -> tuple[list[Sample], dict[str, float]]:
        async with fake() as server:
            return await scored([sample(0, 4, response=last)], config(), [server.url])

    (result,), _ = run(work())
    assert result.teacher_status is ScoreStatus.ok
    torch.testing.assert_close(result.teacher_log_probs, expected(table_model(), result))


def test_empty_response_needs_no_request() -> None:
    async def work() -> tuple[Sample, list[str]]:
        async with fake() as server:
            (result,), _ = await scored([sample(0, 0)], config(), [server.url], top_k=3)
            return result, server.state.calls

    result, calls = run(work())
    assert calls == []
    assert result.teacher_log_probs is not None
    assert result.teacher_log_probs.shape == (0,)
    assert result.teacher_topk is not None
    assert result.teacher_topk.ids.shape == (0, 3)


def test_other_teachers_samples_pass_through() -> None:
    async def work() -> Sample:
        async with fake() as server:
            (result,), metrics = await scored([sample()], config(), [server.url], name="maths")
            assert "teacher/failed_fraction" not in metrics
            return result

    assert run(work()).teacher_log_probs is None


def test_top_k() -> None:
    async def work() -> Sample:
        async with fake() as server:
            (result,), _ = await scored([sample()], config(), [server.url], top_k=4)
            return result

    result = run(work())
    assert result.teacher_topk is not None
    last = torch.cat([result.prompt.tokens[-1:], result.response[:-1]])
    values, ids = table_model().table[last].log_softmax(-1).topk(4)
    torch.testing.assert_close(result.teacher_topk.log_probs, values)
    assert torch.equal(result.teacher_topk.ids, ids)


FAULTS = {
    Fault.delay: ScoreStatus.timeout,
    Fault.drip: ScoreStatus.timeout,
    Fault.error_500: ScoreStatus.http_error,
    Fault.reset: ScoreStatus.http_error,
    Fault.cut: ScoreStatus.http_error,
    Fault.refused: ScoreStatus.refused,
    Fault.truncated: ScoreStatus.misaligned,
    Fault.wrong_length: ScoreStatus.misaligned,
    Fault.shifted: ScoreStatus.misaligned,
    Fault.null: ScoreStatus.nonfinite,
    Fault.nan: ScoreStatus.nonfinite,
}


def test_every_fault_is_tried() -> None:
    assert set(FAULTS) == set(Fault)


def limit_s(fault: Fault) -> float:
    """Short where the fault must run into it, but long enough for the answer to another request on a busy machine."""
    return 2.0 if FAULTS[fault] is ScoreStatus.timeout else 100.0


@pytest.mark.parametrize("fault", Fault)
def test_a_fault_masks_its_sample_alone(fault: Fault) -> None:
    async def work() -> tuple[list[Sample], dict[str, float]]:
        async with fake() as server:
            server.state.faults.add(fault, seconds=1.0 if fault is Fault.drip else 300.0)
            settings = config(concurrency=1, timeout_s=limit_s(fault))
            return await scored([sample(0), sample(1)], settings, [server.url])

    (first, second), metrics = run(work())
    assert first.teacher_status is FAULTS[fault]
    assert first.teacher_log_probs is not None
    assert first.teacher_log_probs.isnan().all()
    assert len(first.teacher_log_probs) == len(first.response)
    assert second.teacher_status is ScoreStatus.ok
    assert metrics["teacher/failed_fraction"] == 0.5
    assert metrics[f"teacher/status/{FAULTS[fault]}"] == 1


@pytest.mark.parametrize("fault", [fault for fault, status in FAULTS.items() if status in ("timeout", "http_error")])
def test_faults_that_may_pass_are_retried(fault: Fault) -> None:
    async def work() -> tuple[list[Sample], dict[str, float]]:
        async with fake() as server:
            server.state.faults.add(fault, seconds=1.0 if fault is Fault.drip else 300.0)
            return await scored([sample()], config(attempts=2, timeout_s=limit_s(fault)), [server.url])

    (result,), metrics = run(work())
    assert result.teacher_status is ScoreStatus.ok
    assert metrics["teacher/retries"] == 1


def test_fallback_rollout_keeps_the_engines_log_probs() -> None:
    async def work() -> tuple[Sample, dict[str, float]]:
        async with fake() as server:
            server.state.faults.add(Fault.null)
            (result,), metrics = await scored([sample()], config(on_failure=OnFailure.fallback_rollout), [server.url])
            return result, metrics

    result, metrics = run(work())
    assert result.teacher_log_probs is result.log_probs
    assert result.teacher_status is ScoreStatus.nonfinite
    assert metrics["teacher/failed_fraction"] == 1.0


def test_abort_raises_at_once() -> None:
    async def work() -> None:
        async with fake() as server:
            server.state.faults.add(Fault.null)
            await scored([sample()], config(on_failure=OnFailure.abort), [server.url])

    with pytest.raises(TeacherError, match=r"nonfinite.*teacher.on_failure=mask"):
        run(work())


def test_too_many_failures_stop_the_run() -> None:
    async def work() -> None:
        async with fake() as server:
            server.state.faults.add(Fault.null, times=2)
            await scored([sample(n) for n in range(4)], config(max_failed_fraction=0.4), [server.url])

    with pytest.raises(TeacherError, match=r"2 of 4 samples.*2 nonfinite.*max_failed_fraction=0.4"):
        run(work())


@pytest.mark.parametrize("policy", [OnFailure.mask, OnFailure.abort])
def test_failures_of_another_teacher_are_told_with_its_own_keys(policy: OnFailure) -> None:
    async def work() -> None:
        async with fake() as server:
            server.state.faults.add(Fault.null)
            settings = config(on_failure=policy, max_failed_fraction=0.4)
            await scored([sample(prompt=prompt(teacher="maths"))], settings, [server.url], name="maths")

    with pytest.raises(TeacherError) as caught:
        run(work())
    key = "max_failed_fraction=0.4 allows" if policy is OnFailure.mask else "on_failure=abort"
    assert f"teachers.maths.{key}" in str(caught.value)
    assert " teacher." not in str(caught.value)


def test_an_overloaded_server_is_told_from_a_broken_one() -> None:
    """Requests that find it left alone because of timeouts count as timeouts, and the message says what helps."""

    async def work() -> None:
        async with fake() as server:
            server.state.faults.add(Fault.delay, times=99, seconds=300.0)
            # One after the other: of two together the second may time out after the last that is left alone.
            settings = config(concurrency=1, timeout_s=0.5, max_failed_fraction=0.2)
            await scored([sample(n) for n in range(6)], settings, [server.url])

    with pytest.raises(TeacherError, match=r"\(6 timeout; last: .*left alone.*did not answer.*teacher.concurrency"):
        run(work())


def test_a_fraction_at_the_limit_is_allowed() -> None:
    async def work() -> dict[str, float]:
        async with fake() as server:
            server.state.faults.add(Fault.null, times=2)
            return (await scored([sample(n) for n in range(4)], config(max_failed_fraction=0.5), [server.url]))[1]

    assert run(work())["teacher/failed_fraction"] == 0.5


def test_too_long_for_the_context() -> None:
    async def work() -> Sample:
        async with fake() as server:
            (result,), _ = await scored([sample(0, 5000)], config(), [server.url])
            return result

    assert run(work()).teacher_status is ScoreStatus.too_long


def test_a_dead_server_is_skipped_and_used_again_when_it_is_back() -> None:
    async def work() -> None:
        async with fake() as first, fake() as second:
            teacher = SglangTeacher(config(attempts=4), Fleet([first.url, second.url]))
            await teacher.start()
            await first.down()
            results = await asyncio.gather(*(teacher.score(sample(n)) for n in range(20)))
            assert all(result.teacher_status is ScoreStatus.ok for result in results)
            assert len(second.state.calls) == 20
            await first.up()
            # Longer than the first server's rest.
            await asyncio.sleep(1.2)
            results = [await teacher.score(sample())]
            results += await asyncio.gather(*(teacher.score(sample(n)) for n in range(20)))
            assert all(result.teacher_status is ScoreStatus.ok for result in results)
            assert len(first.state.calls) >= 10
            await teacher.close()

    run(work())


def test_load_is_balanced_and_bounded() -> None:
    async def work() -> None:
        async with fake() as first, fake() as second:
            for server in (first, second):
                server.state.faults.every = (Fault.delay, 0.05)
            teacher = SglangTeacher(config(concurrency=4), Fleet([first.url, second.url]))
            await teacher.start()
            scoring = asyncio.gather(*(teacher.score(sample(n)) for n in range(24)))
            busiest = 0
            while not scoring.done():
                busiest = max(busiest, sum(endpoint.in_flight for endpoint in teacher.client.pool.endpoints))
                await asyncio.sleep(0.005)
            await scoring
            assert busiest == 4
            assert len(first.state.calls) + len(second.state.calls) == 24
            # Twelve each, but for what one server may be ahead of the other at the end.
            assert min(len(first.state.calls), len(second.state.calls)) >= 10
            await teacher.close()

    run(work())
