"""Rewards that compare or measure text, without any mathematics of their own."""

import re
from dataclasses import dataclass

from opd_trainer.errors import DataError
from opd_trainer.reward.config import ExactReward, FormatReward, Gsm8kReward, LengthReward, MathReward
from opd_trainer.reward.sandbox import Sandbox
from opd_trainer.types import Sample


def label_of(sample: Sample) -> str:
    """The reference answer.

    Raises:
        DataError: the prompt has none.
    """
    if sample.prompt.answer is None:
        raise DataError(
            f"prompt {sample.prompt.id} has no label to compare with. Set data.label_key to the column that holds it, "
            "or reward=none to distil without a task reward"
        )
    return sample.prompt.answer


def after_mark(text: str, mark: str) -> str | None:
    """What follows the last `mark`, without spaces around it; None without a mark."""
    _, found, answer = text.rpartition(mark)
    return answer.strip() if found else None


def number(text: str) -> str:
    """`$1,234.50` as `1234.5`."""
    found = re.search(r"-?[\d,]*\.?\d+", text.replace("$", ""))
    if found is None:
        return text.strip()
    digits = found.group().replace(",", "")
    whole, point, fraction = digits.partition(".")
    sign, whole = ("-", whole[1:]) if whole.startswith("-") else ("", whole)
    return sign + (whole.lstrip("0") or "0") + (f".{fraction.rstrip('0')}" if point and fraction.rstrip("0") else "")


@dataclass(slots=True)
class Nothing:
    """See `NoReward`."""

    async def __call__(self, sample: Sample, group_size: int) -> dict[str, float]:
        """Always 0."""
        return {"reward": 0.0}

    async def close(self) -> None:
        """Holds nothing."""


@dataclass(slots=True)
class Exact:
    """See `ExactReward`."""

    config: ExactReward

    async def __call__(self, sample: Sample, group_size: int) -> dict[str, float]:
        """1 or 0."""
        return {"reward": float(after_mark(sample.text, self.config.mark) == label_of(sample).strip())}

    async def close(self) -> None:
        """Holds nothing."""


@dataclass(slots=True)
class Gsm8k:
    """See `Gsm8kReward`; the label may be GSM8K's whole worked answer."""

    config: Gsm8kReward

    async def __call__(self, sample: Sample, group_size: int) -> dict[str, float]:
        """1 or 0."""
        label, answer = label_of(sample), after_mark(sample.text, "####")
        gold = after_mark(label, "####") if "####" in label else label
        assert gold is not None
        return {"reward": float(answer is not None and number(answer) == number(gold))}

    async def close(self) -> None:
        """Holds nothing."""


@dataclass(slots=True)
class Length:
    """See `LengthReward`."""

    config: LengthReward

    async def __call__(self, sample: Sample, group_size: int) -> dict[str, float]:
        """0 down to -1."""
        over = len(sample.response) - self.config.free_tokens
        allowed = self.config.max_tokens - self.config.free_tokens
        return {"reward": -min(max(over / allowed, 0.0), 1.0)}

    async def close(self) -> None:
        """Holds nothing."""


class Format:
    """See `FormatReward`."""

    def __init__(self, config: FormatReward) -> None:
        self._pattern = config.pattern
        self._sandbox = Sandbox("match", config.num_workers, config.timeout_s)

    async def __call__(self, sample: Sample, group_size: int) -> dict[str, float]:
        """1 or 0."""
        return {"reward": await self._sandbox.ask(response=sample.text, pattern=self._pattern)}

    async def close(self) -> None:
        """Ends the processes."""
        await self._sandbox.close()


class Math:
    """See `MathReward`."""

    def __init__(self, config: MathReward) -> None:
        self._sandbox = Sandbox("math", config.num_workers, config.timeout_s)

    async def __call__(self, sample: Sample, group_size: int) -> dict[str, float]:
        """1 or 0."""
        return {"reward": await self._sandbox.ask(response=sample.text, label=label_of(sample))}

    async def close(self) -> None:
        """Ends the processes."""
        await self._sandbox.close()
