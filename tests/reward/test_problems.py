import pytest

from opd_trainer.reward.config import (
    CompositeReward,
    CustomReward,
    ExactReward,
    FormatReward,
    LengthReward,
    MathReward,
    RemoteReward,
    RewardConfig,
)
from opd_trainer.reward.problems import reward_problems


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        (CustomReward(), "reward.path", "package.module:function"),
        (CustomReward(path="nowhere"), "reward.path", "package.module:function"),
        (CustomReward(path="no_such_package:f"), "reward.path", "No module named"),
        (CustomReward(path="math:nothing"), "reward.path", "nothing"),
        (CustomReward(path="math:pi"), "reward.path", "cannot be called"),
        (CustomReward(path="math:sqrt", max_threads=0), "reward.max_threads", "1 or more"),
        (RemoteReward(), "reward.url", "empty"),
        (RemoteReward(url="host:80"), "reward.url", "no http address"),
        (RemoteReward(url="http://host", retries=-1), "reward.retries", "0 or more"),
        (FormatReward(pattern="("), "reward.pattern", "unterminated"),
        (MathReward(num_workers=0), "reward.num_workers", "1 or more"),
        (LengthReward(free_tokens=5, max_tokens=5), "reward.max_tokens", "no room"),
        (LengthReward(free_tokens=-1), "reward.free_tokens", "short"),
        (CompositeReward(), "reward.parts", "a sum needs parts"),
        (CompositeReward(parts={"reward": ExactReward()}), "reward.parts.reward", "the sum of all parts"),
        (CompositeReward(parts={"a": CustomReward(path="math:pi")}), "reward.parts.a.path", "Set reward.parts.a.path"),
        (ExactReward(timeout_s=0), "reward.timeout_s", "fast"),
        (ExactReward(mark=""), "reward.mark", "where the answer begins"),
    ],
)
def test_settings_that_cannot_work(config: RewardConfig, key: str, message: str) -> None:
    (problem,) = reward_problems(config)
    assert problem.key == key
    assert message in str(problem)


def test_every_part_is_looked_at() -> None:
    parts = {"a": RemoteReward(), "b": FormatReward(pattern="("), "c": ExactReward()}
    assert [problem.key for problem in reward_problems(CompositeReward(parts=parts))] == [
        "reward.parts.a.url",
        "reward.parts.b.pattern",
    ]


def test_a_function_that_is_there() -> None:
    assert reward_problems(CustomReward(path="math:sqrt")) == []
