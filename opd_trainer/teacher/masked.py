"""Which tokens learn nothing from the teacher, and why."""

from collections import Counter
from collections.abc import Sequence

import torch

from opd_trainer import jagged
from opd_trainer.metrics import Metrics
from opd_trainer.types import Sample, TokenBatch

MASK = "mask"
"""The reason of tokens that are not learned from at all; the others are a `ScoreStatus`."""


def masked_fractions(samples: Sequence[Sample], batch: TokenBatch) -> Metrics:
    """opd/masked_fraction, the share of response tokens without an OPD term, and its parts by reason.

    Args:
        samples: of the batch, in its order.
        batch: what is learned from them.
    """
    learned = jagged.count_by(batch.seq, batch.mask, batch.num_sequences).tolist()
    total, without = 0, Counter[str]()
    for sample, count in zip(samples, learned, strict=True):
        total += len(sample.response)
        without[MASK] += len(sample.response) - count
        if count and sample.teacher_log_probs is not None:
            without[sample.teacher_status] += int((~torch.isfinite(sample.teacher_log_probs)).sum())
    metrics = Metrics().put("opd/masked_fraction", without.total() / max(total, 1))
    for reason, tokens in without.items():
        if tokens:
            metrics.put(f"opd/masked_fraction/{reason}", tokens / total)
    return metrics
