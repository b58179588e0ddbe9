import asyncio
import functools
import math
import sys
import threading
import types

import numpy as np
import pytest
from aiohttp import web

from opd_trainer.errors import DataError
from opd_trainer.reward.config import (
    CompositeReward,
    CustomReward,
    ExactReward,
    FormatReward,
    Gsm8kReward,
    LengthReward,
    MathReward,
    NoReward,
    Per,
    RemoteReward,
)
from opd_trainer.reward.custom import Custom
from opd_trainer.reward.pool import RewardPool


def scored(config, samples, group_size=1):
    async def main():
        pool = RewardPool(config, group_size)
        try:
            results = await asyncio.gather(*(pool.score(sample) for sample in samples))
        finally:
            await pool.close()
        return results, pool.metrics().values()

    return asyncio.run(main())


def rewards(config, samples, group_size=1):
    return [sample.reward for sample in scored(config, samples, group_size)[0]]


@pytest.fixture
def functions(monkeypatch):
    """A module of custom rewards."""
    module = types.ModuleType("users_rewards")
    monkeypatch.setitem(sys.modules, "users_rewards", module)
    return module


def test_exact(make_sample):
    texts = ["+785\n#### 76", "#### 7 #### 76 ", "#### 077", "76", "#### 76.", "####76"]
    assert rewards(ExactReward(), [make_sample(text, "76") for text in texts]) == [1, 1, 0, 0, 0, 1]


def test_gsm8k(make_sample):
    published = "He sold 48/2 = <<48/2=24>>24.\n#### 1,234"
    texts = [
        "#### 1234",
        "#### $1,234.00 dollars",
        "#### 1234.5",
        "1234",
        "#### 5 #### 1234",
        "#### -1234",
        "#### none",
    ]
    assert rewards(Gsm8kReward(), [make_sample(text, published) for text in texts]) == [1, 1, 0, 0, 1, 0, 0]
    assert rewards(Gsm8kReward(), [make_sample("#### 0.50", "0.5"), make_sample("#### .5", "0.5")]) == [1, 1]


def test_math(make_sample):
    texts = [r"\boxed{336^\circ}", "Answer: 336", "答案是 336 度", r"\boxed{335}", "336"]
    assert rewards(MathReward(), [make_sample(text, "336") for text in texts]) == [1, 1, 1, 0, 0]


def test_format(make_sample):
    texts = ["<think>a\nb</think>4", "<think>a", "x<think>a</think>"]
    assert rewards(FormatReward(), [make_sample(text) for text in texts]) == [1, 0, 0]


def test_length(make_sample):
    config = LengthReward(free_tokens=4, max_tokens=8)
    assert rewards(config, [make_sample(length=n) for n in (0, 4, 5, 7, 8, 20)]) == [0, 0, -0.25, -0.75, -1, -1]


def test_no_reward_needs_no_label(make_sample):
    assert rewards(NoReward(), [make_sample(label=None)]) == [0]


def test_scale_and_offset_give_plus_and_minus_one(make_sample):
    config = ExactReward(scale=2.0, offset=-1.0)
    assert rewards(config, [make_sample("#### 1", "1"), make_sample("#### 2", "1")]) == [1, -1]


def test_composite_is_the_weighted_sum_with_its_parts(make_sample):
    parts = {"correct": ExactReward(scale=2.0), "length": LengthReward(free_tokens=2, max_tokens=4)}
    (sample,), _ = scored(CompositeReward(parts=parts, offset=0.25), [make_sample("#### 1", "1", length=3)])
    assert sample.reward == 2 - 0.5 + 0.25
    assert sample.reward_parts == {"reward": 1.75, "correct": 2.0, "length": -0.5}


def test_a_part_that_fails_fails_the_sum(make_sample, functions):
    functions.broken = lambda sample: 1 / 0
    parts = {"correct": ExactReward(), "mine": CustomReward(path="users_rewards:broken")}
    (sample,), metrics = scored(CompositeReward(parts=parts), [make_sample("#### 1", "1")])
    assert math.isnan(sample.reward)
    assert metrics["rollout/reward_failed/error"] == 1


def test_a_failure_is_counted_and_never_zero(make_sample, functions, caplog):
    over = threading.Event()

    def judge(sample):
        if sample.text == "slow":
            over.wait(60)
        return {"raise": {}["x"] if sample.text == "raise" else 1, "nan": math.nan, "text": "1", "no": {"a": 1}}.get(
            sample.text, 0.5
        )

    functions.judge = judge
    samples = [make_sample(text) for text in ("fine", "raise", "slow", "nan", "text", "no")]
    results, metrics = scored(CustomReward(path="users_rewards:judge", timeout_s=2.0), samples)
    over.set()
    assert results[0].reward == 0.5
    assert all(math.isnan(result.reward) for result in results[1:])
    assert [list(result.reward_parts) for result in results[1:3]] == [["failed_error"], ["failed_timeout"]]
    assert metrics == {"rollout/reward_failed/error": 4, "rollout/reward_failed/timeout": 1}
    assert "KeyError" in caplog.text


def test_hostile_math_is_a_dropped_sample(make_sample):
    (bad, good), metrics = scored(
        MathReward(timeout_s=3.0), [make_sample(r"\boxed{9^{9^{9^9}}}", "x+1"), make_sample(r"\boxed{1}", "1")]
    )
    assert math.isnan(bad.reward)
    assert good.reward == 1
    assert sum(metrics.values()) == 1


def test_label_missing_is_the_users_error(make_sample):
    with pytest.raises(DataError, match=r"data\.label_key"):
        scored(ExactReward(), [make_sample("#### 1", None)])


def test_custom_sync_async_and_parts(make_sample, functions):
    async def asynchronous(sample):
        await asyncio.sleep(0)
        return {"reward": 2.0, "style": 0.5}

    functions.sync = lambda sample: len(sample.text)
    functions.asynchronous = asynchronous
    assert rewards(CustomReward(path="users_rewards:sync"), [make_sample("abc")]) == [3]
    (sample,), _ = scored(CustomReward(path="users_rewards:asynchronous"), [make_sample()])
    assert sample.reward_parts == {"reward": 2.0, "style": 0.5}


class Judge:
    """What is no function but can be called."""

    async def __call__(self, sample):
        return 2.0


@pytest.mark.parametrize(
    "function",
    [
        lambda sample: np.float32(2.0),
        lambda sample: np.int64(2),
        lambda sample: {"reward": np.float64(2.0)},
        lambda sample: asyncio.sleep(0, result=2.0),
        functools.partial(lambda value, sample: asyncio.sleep(0, result=value), 2.0),
        Judge(),
    ],
    ids=["float32", "int64", "part", "returns a coroutine", "partial", "object"],
)
def test_custom_in_other_forms(make_sample, functions, function):
    functions.judge = function
    assert rewards(CustomReward(path="users_rewards:judge"), [make_sample()]) == [2.0]


def test_custom_per_group_gets_all_siblings_in_order(make_sample, functions):
    calls = []

    def rank(samples):
        calls.append([sample.index for sample in samples])
        longest = max(len(sample.text) for sample in samples)
        return [float(len(sample.text) == longest) for sample in samples]

    functions.rank = rank
    order = [("a", 1, "yy"), ("b", 0, "z"), ("a", 0, "y"), ("b", 1, "")]
    samples = [make_sample(text, prompt_id=p, index=i) for p, i, text in order]
    config = CustomReward(path="users_rewards:rank", per=Per.group)
    assert rewards(config, samples, group_size=2) == [1, 1, 0, 0]
    assert calls == [[0, 1], [0, 1]]
    functions.rank = lambda samples: [1.0]
    assert all(math.isnan(reward) for reward in rewards(config, samples, group_size=2))


def test_custom_per_group_a_sibling_that_gives_up_leaves_the_others_their_reward(make_sample, functions):
    functions.count = lambda samples: [float(len(samples))] * len(samples)

    async def main():
        custom = Custom(CustomReward(path="users_rewards:count", per=Per.group))
        given_up = asyncio.create_task(custom(make_sample(index=0), 2))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        return await custom(make_sample(index=1), 2)

    assert asyncio.run(main()) == {"reward": 2.0}


class Server:
    """A reward server on this machine whose answers are scripted."""

    def __init__(self, answers):
        self.answers = list(answers)
        self.questions = []
        self.asked_at_once = self.most_at_once = 0

    async def __aenter__(self):
        application = web.Application()
        application.router.add_post("/reward", self.answer)
        self.runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}/reward"
        return self

    async def __aexit__(self, *_):
        await self.runner.cleanup()

    async def answer(self, request):
        self.questions.append(await request.json())
        status, body, delay = self.answers.pop(0)
        self.asked_at_once += 1
        self.most_at_once = max(self.most_at_once, self.asked_at_once)
        await asyncio.sleep(delay)
        self.asked_at_once -= 1
        return web.json_response(body, status=status)


def ask(answers, sample, **settings):
    async def main():
        async with Server(answers) as server:
            pool = RewardPool(RemoteReward(url=server.url, **settings), 1)
            try:
                return await pool.score(sample), server, pool.metrics().values()
            finally:
                await pool.close()

    return asyncio.run(main())


def test_remote_asks_and_retries(make_sample):
    answers = [(503, {}, 0), (200, 9, 60.0), (200, {"reward": 0.5, "style": 2}, 0)]
    sample = make_sample("text", "label", metadata={"level": 3})
    scored_sample, server, _ = ask(answers, sample, timeout_s=2.0)
    assert scored_sample.reward_parts == {"reward": 0.5, "style": 2.0}
    assert server.questions == [{"prompt": "q", "response": "text", "label": "label", "metadata": {"level": 3}}] * 3


@pytest.mark.parametrize(
    ("answers", "settings", "kind", "num_asked"),
    [
        ([(500, {}, 0)] * 2, {"retries": 1}, "error", 2),
        ([(200, 1, 60.0)] * 2, {"retries": 1, "timeout_s": 1.0}, "timeout", 2),
        ([(404, {}, 0)], {}, "error", 1),
        ([(200, {"score": 1}, 0)], {}, "error", 1),
        ([(200, None, 0)], {}, "error", 1),
    ],
)
def test_remote_failures(make_sample, caplog, answers, settings, kind, num_asked):
    sample, server, metrics = ask(answers, make_sample(), **settings)
    assert math.isnan(sample.reward)
    assert server.url in caplog.text
    assert metrics[f"rollout/reward_failed/{kind}"] == 1
    assert len(server.questions) == num_asked


@pytest.mark.parametrize("limit", [1, 3])
def test_remote_is_asked_so_much_at_once(make_sample, limit):
    async def main():
        async with Server([(200, 1, 0.1)] * 6) as server:
            pool = RewardPool(RemoteReward(url=server.url, max_connections=limit), 1)
            try:
                await asyncio.gather(*(pool.score(make_sample(str(number))) for number in range(6)))
            finally:
                await pool.close()
            return server.most_at_once

    assert asyncio.run(main()) == limit


def test_remote_nobody_there(make_sample):
    (sample,), metrics = scored(RemoteReward(url="http://127.0.0.1:9/reward", retries=1), [make_sample()])
    assert math.isnan(sample.reward)
    assert metrics["rollout/reward_failed/error"] == 1
