"""From a configuration to rewards on samples: composition, scale and offset, and what becomes of failures."""

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass

from opd_trainer.errors import UserError
from opd_trainer.metrics import Metrics
from opd_trainer.protocols import Reward
from opd_trainer.reward.config import (
    CompositeReward,
    CustomReward,
    ExactReward,
    FormatReward,
    Gsm8kReward,
    LengthReward,
    MathReward,
    NoReward,
    RemoteReward,
    RewardConfig,
)
from opd_trainer.types import Sample

log = logging.getLogger(__name__)
SHOWN_FAILURES = 5


@dataclass(slots=True)
class Scaled:
    """scale * value + offset."""

    reward: Reward
    config: RewardConfig

    async def __call__(self, sample: Sample, group_size: int) -> dict[str, float]:
        """The parts, the total scaled."""
        parts = await self.reward(sample, group_size)
        return parts | {"reward": self.config.scale * parts["reward"] + self.config.offset}

    async def close(self) -> None:
        """Closes what it scales."""
        await self.reward.close()


@dataclass(slots=True)
class Composite:
    """The sum of its parts; fails when one of them fails."""

    parts: dict[str, Reward]

    async def __call__(self, sample: Sample, group_size: int) -> dict[str, float]:
        """The total, each part's total under its name, and the parts of a part as ``name/part``."""
        results = await asyncio.gather(*(part(sample, group_size) for part in self.parts.values()))
        total: dict[str, float] = {"reward": sum(result["reward"] for result in results)}
        for name, result in zip(self.parts, results, strict=True):
            total |= {name if key == "reward" else f"{name}/{key}": value for key, value in result.items()}
        return total

    async def close(self) -> None:
        """Closes every part."""
        await asyncio.gather(*(part.close() for part in self.parts.values()))


def build_reward(config: RewardConfig) -> Reward:
    """The reward that `config`, an option of ``reward=`` without `reward_problems`, describes.

    Raises:
        ConfigError: there is no such custom function.
    """
    # Imported here: each brings what only its own option needs.
    from opd_trainer.reward.custom import Custom
    from opd_trainer.reward.remote import Remote
    from opd_trainer.reward.rules import Exact, Format, Gsm8k, Length, Math, Nothing

    match config:
        case NoReward():
            reward: Reward = Nothing()
        case ExactReward():
            reward = Exact(config)
        case Gsm8kReward():
            reward = Gsm8k(config)
        case MathReward():
            reward = Math(config)
        case FormatReward():
            reward = Format(config)
        case LengthReward():
            reward = Length(config)
        case RemoteReward():
            reward = Remote(config)
        case CustomReward():
            reward = Custom(config)
        case CompositeReward():
            reward = Composite({name: build_reward(part) for name, part in config.parts.items()})
        case _:
            raise AssertionError(f"no reward for {type(config).__name__}")
    return Scaled(reward, config)


class RewardPool:
    """The judge that puts a reward on every sample; `group_size` samples of each prompt come to it."""

    def __init__(self, config: RewardConfig, group_size: int) -> None:
        self._reward = build_reward(config)
        self._group_size = group_size
        self.grades = not isinstance(config, NoReward)
        """Whether a reward tells right answers from wrong ones."""
        self._failures: Counter[str] = Counter()
        self._shown = 0

    async def score(self, sample: Sample, group_size: int | None = None) -> Sample:
        """The sample with its reward; NaN when the reward timed out or raised, which is counted and never taken for 0.

        Args:
            sample: to be judged.
            group_size: samples of its prompt that come, where that is not the pool's own number.

        Raises:
            UserError: the configuration or the data are at fault, not the sample.
        """
        try:
            parts = await self._reward(sample, group_size or self._group_size)
        except UserError:
            raise
        except TimeoutError as error:
            return self._failed(sample, "timeout", error)
        except Exception as error:
            return self._failed(sample, "error", error)
        return sample.replace(reward=parts["reward"], reward_parts=parts)

    def _failed(self, sample: Sample, kind: str, error: Exception) -> Sample:
        self._failures[kind] += 1
        if self._shown < SHOWN_FAILURES:
            self._shown += 1
            log.warning("no reward for a sample of %s: %s: %s", sample.prompt.id, type(error).__name__, error)
        return sample.replace(reward=float("nan"), reward_parts={f"failed_{kind}": 1.0})

    def metrics(self) -> Metrics:
        """Failures by kind since the last call."""
        metrics = Metrics()
        for kind in ("timeout", "error"):
            metrics.put(f"rollout/reward_failed/{kind}", self._failures.pop(kind, 0))
        return metrics

    async def close(self) -> None:
        """Ends processes and connections. Safe to call twice."""
        await self._reward.close()
