"""Settings of a reward that cannot work, found before anything starts."""

import re
from collections.abc import Iterator

from opd_trainer.errors import ConfigError, Problem
from opd_trainer.reward.config import (
    CompositeReward,
    CustomReward,
    ExactReward,
    FormatReward,
    LengthReward,
    RemoteReward,
    RewardConfig,
)

TOTAL = "reward"
"""The name of the total among the parts of a reward."""


def reward_problems(config: RewardConfig, at: str = "reward") -> list[Problem]:
    """Everything about the values of a reward, and of its parts, that cannot work.

    Args:
        config: an option of `reward=`.
        at: its dotted key.
    """
    found = [*_limits(config, at)]
    match config:
        case ExactReward():
            found += _mark(config, at)
        case LengthReward():
            found += _length(config, at)
        case FormatReward():
            found += _pattern(config, at)
        case RemoteReward():
            found += _address(config, at)
        case CustomReward():
            found += _function(config, at)
        case CompositeReward():
            found += _parts(config, at)
    return found


def _limits(config: RewardConfig, at: str) -> Iterator[Problem]:
    """Times and numbers of workers, of whatever kind of reward has them."""
    if not config.timeout_s > 0:
        yield Problem(f"{at}.timeout_s", f"{config.timeout_s:g}", "no reward is that fast", f"Set {at}.timeout_s=10")
    for name, smallest in (("num_workers", 1), ("max_threads", 1), ("max_connections", 1), ("retries", 0)):
        value = getattr(config, name, smallest)
        if value < smallest:
            why = f"the smallest value that makes sense is {smallest}"
            yield Problem(f"{at}.{name}", f"{value}", why, f"Set {at}.{name}={smallest} or more")


def _mark(config: ExactReward, at: str) -> Iterator[Problem]:
    if not config.mark:
        yield Problem(f"{at}.mark", "empty", "nothing would say where the answer begins", f"Set {at}.mark='####'")


def _length(config: LengthReward, at: str) -> Iterator[Problem]:
    if config.free_tokens < 0:
        yield Problem(
            f"{at}.free_tokens", f"{config.free_tokens}", "no response is that short", f"Set {at}.free_tokens=0"
        )
    if config.max_tokens <= config.free_tokens:
        yield Problem(
            f"{at}.max_tokens",
            f"{config.max_tokens} with {at}.free_tokens={config.free_tokens}",
            "the penalty has no room to fall",
            f"Set {at}.max_tokens above {at}.free_tokens",
        )


def _pattern(config: FormatReward, at: str) -> Iterator[Problem]:
    try:
        re.compile(config.pattern)
    except re.error as error:
        yield Problem(f"{at}.pattern", repr(config.pattern), str(error), f"Repair {at}.pattern")


def _address(config: RemoteReward, at: str) -> Iterator[Problem]:
    if not config.url.startswith(("http://", "https://")):
        what = "empty" if not config.url else repr(config.url)
        yield Problem(f"{at}.url", what, "it is no http address", f"Set {at}.url=http://HOST:PORT/PATH")


def _function(config: CustomReward, at: str) -> Iterator[Problem]:
    # It imports what only this option needs.
    from opd_trainer.reward.custom import load_function

    try:
        load_function(config.path, at)
    except ConfigError as error:
        yield from error.problems


def _parts(config: CompositeReward, at: str) -> Iterator[Problem]:
    if not config.parts:
        fix = f"Choose parts: +reward@{at}.parts.correct=math +reward@{at}.parts.length=length"
        yield Problem(f"{at}.parts", "empty", "a sum needs parts", fix)
    for name, part in config.parts.items():
        if name == TOTAL:
            why = "the sum of all parts has this name"
            yield Problem(f"{at}.parts.{name}", "a part of this name", why, "Give it another name")
        yield from reward_problems(part, f"{at}.parts.{name}")
