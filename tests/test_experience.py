"""Steps of generation under filters, with an engine and a reward that follow a script."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

from opd_trainer.data.stream import PromptStream
from opd_trainer.errors import DataError
from opd_trainer.experience import OnPolicyExperience, describe
from opd_trainer.metrics import Metrics
from opd_trainer.rollout.config import FilterConfig, ZeroStd
from opd_trainer.tracking.tracker import StepLog
from opd_trainer.tracking.wall_time import WallTime
from opd_trainer.types import Finish, Prompt, Request, Sample, Sampling, WeightStream

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=4, stop_token_ids=(0,))


@dataclass
class Scripted:
    """Two tokens for each request; what is wrong with it is decided by `finish`."""

    finish: Callable[[Request], Finish] = lambda request: Finish.stop
    rounds: list[list[str]] = field(default_factory=list)

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> AsyncIterator[Sample]:
        self.rounds.append([request.prompt.id for request in requests if request.index == 0])
        for request in reversed(requests):
            yield Sample(
                prompt=request.prompt,
                index=request.index,
                response=torch.tensor([1, 0]),
                log_probs=torch.tensor([-1.0, -1.0]),
                finish=self.finish(request),
                version=0,
                text="",
            )

    async def start(self) -> None: ...

    def metrics(self) -> Metrics:
        return Metrics()

    async def load(self, weights: WeightStream) -> None: ...
    async def close(self) -> None: ...


@dataclass
class Verdict:
    """A reward that is a function of prompt number and sibling."""

    of: Callable[[int, int], float]

    async def score(self, sample: Sample) -> Sample:
        value = self.of(int(sample.prompt.id), sample.index)
        return sample.replace(reward=value, reward_parts={"correct": float(value > 0), "reward": value})

    def metrics(self) -> Metrics:
        return Metrics()


def uneven(number: int, index: int) -> float:
    """Prompts with an odd number have siblings that differ."""
    return float(index if number % 2 else 1)


def experience(
    filters: FilterConfig, *, reward: Callable[[int, int], float] = uneven, prompts: int = 30, **changes: Any
) -> OnPolicyExperience:
    found = [Prompt(id=str(number), tokens=torch.tensor([2]), text="") for number in range(prompts)]
    pieces: dict[str, Any] = {
        "stream": PromptStream.of(found),
        "engine": Scripted(),
        "judges": [Verdict(reward)],
        "sampling": SAMPLING,
        "prompts_per_step": 4,
        "samples_per_prompt": 2,
        "seed": 0,
        "filter": filters,
    }
    return OnPolicyExperience(**(pieces | changes))


def step(of: OnPolicyExperience, number: int = 0) -> tuple[Any, dict[str, float]]:
    log = StepLog(WallTime())
    batch = asyncio.run(of.next(number, log))
    return batch, log.metrics.values()


def rounds(of: OnPolicyExperience) -> list[list[str]]:
    return cast(Scripted, of.engine).rounds


def test_what_was_sampled_is_described() -> None:
    # Lengths 3, 1 and 2, of which one was cut; rewards 1, 0 and 2, of which a part is named; groups of two and of one.
    asked = [("a", 0, 3, 1.0), ("a", 1, 1, 0.0), ("b", 0, 2, 2.0)]
    samples = [
        Sample(
            prompt=Prompt(id=name, tokens=torch.tensor([2]), text=""),
            index=index,
            response=torch.zeros(length, dtype=torch.int64),
            log_probs=torch.full((length,), -float(length)),
            finish=Finish.length if length == 3 else Finish.stop,
            version=0,
            text="",
            reward=reward,
            reward_parts={"reward": reward, "style": reward / 2},
        )
        for name, index, length, reward in asked
    ]
    assert describe(samples, 5).values() == pytest.approx(
        {
            "rollout/response_length/mean": 2.0,
            "rollout/response_length/max": 3.0,
            "rollout/response_length/min": 1.0,
            "rollout/truncated_ratio": 1 / 3,
            "rollout/dropped": 5.0,
            "rollout/reward": 1.0,
            "rollout/reward/style": 0.5,
            "rollout/log_prob": -(9 + 1 + 4) / 6,
            "rollout/zero_std_fraction": 0.5,
        }
    )


def test_without_filters_every_sample_is_learned_from_and_none_is_counted_as_filtered() -> None:
    batch, metrics = step(experience(FilterConfig()))
    assert batch.num_sequences == 8
    assert not any("filtered" in name or "skipped" in name for name in metrics)


def test_groups_without_contrast_are_dropped_and_counted() -> None:
    of = experience(FilterConfig(zero_std=ZeroStd.drop), prompts_per_step=8)
    batch, metrics = step(of)
    odd = [prompt for prompt in rounds(of)[0] if int(prompt) % 2]
    assert 0 < len(odd) < 8
    assert batch.num_sequences == 2 * len(odd)
    assert batch.reward.tolist() == [0.0, 1.0] * len(odd)
    assert metrics["rollout/filtered/zero_std_groups"] == 8 - len(odd)
    assert metrics["rollout/filtered/missing_groups"] == 8 - len(odd)
    assert metrics["rollout/zero_std_fraction"] == (8 - len(odd)) / 8
    assert metrics["rollout/skipped_steps"] == 0


def test_replacing_asks_other_prompts_until_the_step_is_full() -> None:
    of = experience(FilterConfig(zero_std=ZeroStd.replace))
    batch, metrics = step(of)
    assert batch.num_sequences == 8
    asked = [prompt for one in rounds(of) for prompt in one]
    assert len(set(asked)) == len(asked) > 4
    assert sum(int(prompt) % 2 for prompt in asked) == 4
    assert metrics["rollout/filtered/extra_prompts"] == len(asked) - 4
    assert metrics["rollout/filtered/zero_std_groups"] == len(asked) - 4
    assert metrics["rollout/filtered/missing_groups"] == 0
    # What was sampled is described as it was, filtered or not.
    assert metrics["rollout/reward"] == (4 * 0.5 + (len(asked) - 4)) / len(asked)


def test_over_sampling_has_a_bound() -> None:
    bounded = FilterConfig(zero_std=ZeroStd.replace, max_rounds=2)
    of = experience(bounded, reward=lambda number, index: float(index and number % 5 == 0), prompts_per_step=8)
    batch, metrics = step(of)
    assert len(rounds(of)) == 2
    assert metrics["rollout/filtered/missing_groups"] == 8 - batch.num_sequences / 2 > 0


def test_a_step_without_anything_to_learn_from_is_skipped_and_counted() -> None:
    for zero_std in (ZeroStd.drop, ZeroStd.replace):
        batch, metrics = step(experience(FilterConfig(zero_std=zero_std), reward=lambda number, index: 1.0))
        assert batch is None
        assert metrics["rollout/skipped_steps"] == 1
        assert metrics["rollout/reward"] == 1


def test_no_prompt_is_asked_twice_in_a_step_that_crosses_an_epoch() -> None:
    of = experience(FilterConfig(zero_std=ZeroStd.replace, max_rounds=50), prompts=5, reward=lambda number, index: 0.0)
    step(of)
    asked = [prompt for one in rounds(of) for prompt in one]
    assert len(asked) == len(set(asked))


def test_the_cursor_counts_the_prompts_of_every_round() -> None:
    of = experience(FilterConfig(zero_std=ZeroStd.replace))
    step(of)
    state = of.state_dict()
    again = experience(FilterConfig(zero_std=ZeroStd.replace))
    again.load_state_dict(state)
    ahead, behind = step(of, 1), step(again, 1)
    assert rounds(of)[-1] == rounds(again)[-1]
    assert torch.equal(ahead[0].reward, behind[0].reward)
    assert not set(rounds(again)[0]) & set(rounds(of)[0])


def test_a_part_of_the_reward_can_tell_the_contrast() -> None:
    by_length = FilterConfig(zero_std=ZeroStd.drop, part="correct")
    batch, _ = step(experience(by_length, reward=lambda number, index: 1.0 + index))
    assert batch is None
    with pytest.raises(
        DataError, match=r"rollout\.filter\.part=style: the reward has no such part, only correct, reward"
    ):
        step(experience(FilterConfig(zero_std=ZeroStd.drop, part="style")))


def test_truncated_responses_have_no_loss_and_count_in_their_group() -> None:
    engine = Scripted(lambda request: Finish.length if request.index else Finish.stop)
    batch, metrics = step(experience(FilterConfig(mask_truncated=True), engine=engine))
    assert batch.num_sequences == 8
    assert batch.mask.view(8, 3).any(1).tolist() == [True, False] * 4
    assert batch.reward.view(4, 2)[:, 1].sum() > 0
    assert metrics["rollout/filtered/truncated"] == 4
    assert metrics["rollout/truncated_ratio"] == 0.5


def test_a_step_of_truncated_responses_only_is_skipped() -> None:
    engine = Scripted(lambda request: Finish.length)
    batch, metrics = step(experience(FilterConfig(mask_truncated=True), engine=engine))
    assert batch is None
    assert metrics["rollout/skipped_steps"] == 1


@pytest.mark.parametrize("filters", [FilterConfig(), FilterConfig(zero_std=ZeroStd.replace)])
def test_a_step_whose_samples_were_all_dropped_is_an_error(filters: FilterConfig) -> None:
    with pytest.raises(DataError, match="without a single usable sample"):
        step(experience(filters, engine=Scripted(lambda request: Finish.abort)))
    with pytest.raises(DataError, match="without a single usable sample"):
        step(experience(filters, reward=lambda number, index: float("nan")))


def test_a_sample_without_reward_leaves_its_siblings() -> None:
    reward = lambda number, index: float("nan") if index == 0 else float(index)  # noqa: E731
    batch, metrics = step(experience(FilterConfig(zero_std=ZeroStd.drop), reward=reward, samples_per_prompt=3))
    assert batch.num_sequences == 8
    assert metrics["rollout/dropped"] == 4
