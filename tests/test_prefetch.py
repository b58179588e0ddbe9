"""One-step-off rollouts with a scripted engine: what is generated when, what waits, what a checkpoint keeps."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

from opd_trainer.data.stream import PromptStream
from opd_trainer.errors import OpdError
from opd_trainer.experience import OnPolicyExperience
from opd_trainer.metrics import Metrics
from opd_trainer.prefetch import OneStepOffExperience, SettledEngine
from opd_trainer.rollout.config import FilterConfig, ZeroStd
from opd_trainer.sample_state import pack, unpack
from opd_trainer.tracking.tracker import StepLog
from opd_trainer.tracking.wall_time import Phase, WallTime
from opd_trainer.types import Finish, Prompt, Request, Sample, Sampling, ScoreStatus, TopK, WeightStream

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=4, stop_token_ids=(0,))


async def nothing() -> AsyncIterator[list[tuple[str, torch.Tensor]]]:
    """Weights of a model without any."""
    for bucket in ():
        yield bucket


@dataclass
class Slow:
    """An engine that yields to the event loop, and keeps a diary."""

    version: int = 0
    diary: list[str] = field(default_factory=list)
    fail_at: int | None = None

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> AsyncIterator[Sample]:
        self.diary.append(f"begin v{self.version}")
        for number, request in enumerate(requests):
            await asyncio.sleep(0)
            if number == self.fail_at:
                raise OpdError("the engine broke")
            drawn = torch.Generator().manual_seed(request.seed + self.version)
            yield Sample(
                prompt=request.prompt,
                index=request.index,
                response=torch.randint(9, (3,), generator=drawn),
                log_probs=-torch.rand(30, generator=drawn)[:3],
                finish=Finish.stop,
                version=self.version,
                text=f"{request.prompt.id}",
            )
        self.diary.append(f"end v{self.version}")

    async def start(self) -> None: ...

    def metrics(self) -> Metrics:
        return Metrics()

    async def load(self, weights: WeightStream) -> None:
        self.version = weights.version
        self.diary.append(f"load v{self.version}")

    async def close(self) -> None: ...


@dataclass
class Judge:
    """Rewards by the first token, and counts."""

    count: int = 0

    async def score(self, sample: Sample) -> Sample:
        self.count += 1
        reward = float(sample.response[0] % 2)
        return sample.replace(reward=reward, reward_parts={"reward": reward})

    def metrics(self) -> Metrics:
        found, self.count = Metrics().put("judge/count", self.count), 0
        return found


@dataclass
class Run:
    """The loop, with an update that changes nothing but the version."""

    engine: Slow = field(default_factory=Slow)
    steps: int = 5
    filter: FilterConfig = field(default_factory=FilterConfig)
    wall: WallTime = field(default_factory=WallTime)
    lines: list[dict[str, float]] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        source = OnPolicyExperience(
            stream=PromptStream.of([Prompt(id=str(n), tokens=torch.tensor([n]), text=f"<{n}>") for n in range(40)]),
            engine=cast(Any, self.engine),
            judges=[Judge()],
            sampling=SAMPLING,
            prompts_per_step=4,
            samples_per_prompt=2,
            seed=0,
            filter=self.filter,
        )
        self.experience = OneStepOffExperience(source, self.steps, lambda: self.wall.time(Phase.rollout))
        self.shared = SettledEngine(cast(Any, self.engine), self.experience)

    async def step(self, step: int) -> None:
        log = StepLog(self.wall)
        self.batches.append(await self.experience.next(step, log))
        await asyncio.sleep(0)
        self.engine.diary.append(f"update {step}")
        await self.shared.load(WeightStream(step + 1, nothing()))
        self.lines.append(log.metrics.values())

    async def go(self, first: int, last: int) -> None:
        for step in range(first, last):
            await self.step(step)


def test_generation_goes_on_during_the_update_and_new_weights_wait_for_it() -> None:
    run = Run(steps=3)
    asyncio.run(run.go(0, 3))
    assert run.engine.diary == [
        *("begin v0", "end v0", "begin v0", "update 0", "end v0", "load v1"),
        *("begin v1", "update 1", "end v1", "load v2"),
        *("update 2", "load v3"),
    ]


def test_samples_are_one_version_old_at_most_and_say_so() -> None:
    run = Run()
    asyncio.run(run.go(0, 5))
    assert [batch.version.unique().tolist() for batch in run.batches] == [[0], [0], [1], [2], [3]]
    assert [line["rollout/staleness"] for line in run.lines] == [0, 1, 1, 1, 1]
    assert [line["judge/count"] for line in run.lines] == [8] * 5


def test_samples_that_are_older_are_refused() -> None:
    run = Run()
    with pytest.raises(OpdError, match="more than 1 behind"):
        asyncio.run(run.go(2, 3))


def test_nothing_is_generated_beyond_the_last_step() -> None:
    run = Run(steps=2)
    asyncio.run(run.go(0, 2))
    assert run.engine.diary.count("begin v0") + run.engine.diary.count("begin v1") == 2
    assert run.experience.state_dict()["ready"] is None


@pytest.mark.parametrize("filters", [FilterConfig(), FilterConfig(zero_std=ZeroStd.replace)])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_resumed_run_goes_on_with_the_samples_that_were_ready(filters: FilterConfig, after: int) -> None:
    whole = Run(filter=filters)
    asyncio.run(whole.go(0, 5))
    before = Run(filter=filters)
    asyncio.run(before.go(0, after))
    state = json.loads(json.dumps(before.experience.state_dict()))
    resumed = Run(engine=Slow(version=after), filter=filters)
    resumed.experience.load_state_dict(state)
    asyncio.run(resumed.go(after, 5))
    assert before.lines + resumed.lines == whole.lines
    for mine, theirs in zip(before.batches + resumed.batches, whole.batches, strict=True):
        assert torch.equal(mine.tokens, theirs.tokens)
        assert torch.equal(mine.rollout.log_probs.nan_to_num(), theirs.rollout.log_probs.nan_to_num())
        assert torch.equal(mine.version, theirs.version)
    asked = [line for line in resumed.engine.diary if line.startswith("begin")]
    assert len(asked) < len([line for line in whole.engine.diary if line.startswith("begin")])


def test_an_engine_that_breaks_ends_the_run() -> None:
    async def broken() -> None:
        run = Run()
        await run.step(0)
        run.engine.fail_at = 3
        await run.step(1)

    with pytest.raises(OpdError, match="the engine broke"):
        asyncio.run(broken())


def test_closing_gives_up_what_is_under_way() -> None:
    async def closed() -> Run:
        run = Run()
        await run.experience.next(0, StepLog(run.wall))
        await run.experience.close()
        await run.experience.close()
        return run

    assert asyncio.run(closed()).engine.diary[-1] != "end v1"


def test_evaluation_waits_for_the_samples_under_way() -> None:
    async def evaluated() -> list[str]:
        run = Run()
        await run.experience.next(0, StepLog(run.wall))
        request = Request(prompt=Prompt(id="x", tokens=torch.tensor([1]), text=""), index=0, seed=0)
        async for _ in run.shared.generate([request], SAMPLING):
            pass
        return run.engine.diary

    assert asyncio.run(evaluated()) == ["begin v0", "end v0"] * 3


def test_samples_survive_packing() -> None:
    candidates = TopK(ids=torch.tensor([[1, 2]]), log_probs=torch.tensor([[-0.1, -2.5]]))
    sample = Sample(
        prompt=Prompt(id="p", tokens=torch.arange(4), text="<p>", answer="7", dataset="math", teacher="t"),
        index=3,
        response=torch.arange(100)[5:8],
        log_probs=torch.tensor([-0.1, float("nan"), -3e-7]),
        finish=Finish.length,
        version=9,
        text="seven",
        reward=0.1,
        reward_parts={"reward": 0.1, "format": 1.0},
        teacher_log_probs=torch.tensor([-0.5, -0.25, float("nan")]),
        teacher_temperature=0.7,
        teacher_status=ScoreStatus.timeout,
        topk=candidates,
    )
    (found,) = unpack(pack([sample]))
    assert torch.equal(found.response, sample.response)
    assert found.response.untyped_storage().nbytes() == 3 * 8
    for name in ("log_probs", "teacher_log_probs"):
        assert torch.equal(getattr(found, name).view(torch.int32), getattr(sample, name).view(torch.int32))
    assert torch.equal(found.prompt.tokens, sample.prompt.tokens)
    assert found.topk is not None
    assert torch.equal(found.topk.log_probs, candidates.log_probs)
    for name in ("index", "finish", "version", "text", "reward", "reward_parts", "teacher_temperature"):
        assert getattr(found, name) == getattr(sample, name)
    assert found.teacher_status is ScoreStatus.timeout
    assert found.teacher_topk is None
    assert found.prompt.answer == "7"
