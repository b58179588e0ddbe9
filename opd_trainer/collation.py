"""From samples to a batch.

N = samples, T = their tokens laid end to end (prompt and response).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_trainer import jagged
from opd_trainer.errors import DataError, Incomparable
from opd_trainer.types import Finish, Sample, Scores, TokenBatch


def collate(samples: Sequence[Sample], temperature: float) -> TokenBatch:
    """Lays samples end to end; siblings (equal prompt id) become a group.

    Args:
        samples: with what their judges found out.
        temperature: that they were sampled at.

    Raises:
        DataError: there is no sample at all.
        Incomparable: their teachers' log-probs are of different temperatures.
    """
    if not samples:
        raise DataError("there is not a single usable sample: every one was dropped")
    groups: dict[str, int] = {}
    lengths = torch.tensor([len(s.prompt.tokens) + len(s.response) for s in samples])
    return TokenBatch(
        tokens=torch.cat([part for s in samples for part in (s.prompt.tokens, s.response)]),
        seq=jagged.seq_from_lengths(lengths),
        mask=torch.cat(
            [part for s in samples for part in (torch.zeros(len(s.prompt.tokens)), torch.ones(len(s.response)))]
        ).bool(),
        group=torch.tensor([groups.setdefault(s.prompt.id, len(groups)) for s in samples]),
        reward=torch.tensor([s.reward for s in samples], dtype=torch.float32),
        truncated=torch.tensor([s.finish is Finish.length for s in samples]),
        teacher_name=tuple(s.prompt.teacher for s in samples),
        rollout=Scores(
            log_probs=_of_responses(samples, [s.log_probs for s in samples]), temperature=temperature, model="rollout"
        ),
        version=torch.tensor([s.version for s in samples]),
        teacher=_teacher(samples),
    )


def _teacher(samples: Sequence[Sample]) -> Scores | None:
    """The log-probs of teachers that scored the samples one by one; None where none did."""
    temperatures = {s.teacher_temperature for s in samples if s.teacher_log_probs is not None}
    if not temperatures:
        return None
    if len(temperatures) > 1:
        raise Incomparable(f"teachers gave log-probs of different temperatures: {sorted(temperatures)}")
    log_probs = _of_responses(samples, [s.teacher_log_probs for s in samples])
    return Scores(log_probs=log_probs, temperature=temperatures.pop(), model="teacher")


def _of_responses(samples: Sequence[Sample], values: Sequence[Tensor | None]) -> Tensor:
    """f32[T] from one tensor for each response, NaN elsewhere."""
    parts: list[Tensor] = []
    for sample, value in zip(samples, values, strict=True):
        parts.append(torch.full((len(sample.prompt.tokens),), torch.nan))
        parts.append(torch.full((len(sample.response),), torch.nan) if value is None else value)
    return torch.cat(parts)
