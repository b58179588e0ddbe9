"""Which of a step's samples are learned from: groups without contrast left out, truncated responses masked.

Both after DAPO (arXiv 2503.14476): dynamic sampling (section 3.2) and overlong filtering (section 3.4).
"""

from collections.abc import Iterable, Sequence

from opd_trainer.errors import DataError
from opd_trainer.rollout.config import FilterConfig
from opd_trainer.types import Sample, TokenBatch


def groups_of(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Siblings together, in the order of their first."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt.id, []).append(sample)
    return list(groups.values())


def has_contrast(group: Sequence[Sample], options: FilterConfig) -> bool:
    """Whether the siblings' rewards, or the chosen part of them, are not all the same.

    Raises:
        DataError: the reward has no such part.
    """
    return len({_compared(sample, options.part) for sample in group}) > 1


def without_truncated(batch: TokenBatch) -> TokenBatch:
    """The batch with the tokens of truncated responses masked; their rewards stay, and count in their groups."""
    return batch.replace(mask=batch.mask & ~batch.truncated[batch.seq])


def _compared(sample: Sample, part: str | None) -> float:
    if part is None:
        return sample.reward
    if part not in sample.reward_parts:
        raise DataError(
            f"rollout.filter.part={part}: the reward has no such part, only {', '.join(sample.reward_parts)}. "
            "Set rollout.filter.part to one of them, or to null for the whole reward"
        )
    return sample.reward_parts[part]
