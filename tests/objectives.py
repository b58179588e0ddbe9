"""What tests of the objective share: settings, a batch of unequal responses, results of an update."""

import torch
from torch import Tensor

from opd_trainer.divergence.config import DivergenceConfig, DivergenceKind
from opd_trainer.opd.config import OpdConfig, OpdType
from opd_trainer.types import TokenBatch
from opd_trainer.updates import UpdateResult
from tests.laws.options import NAN

OFF = OpdConfig(type=OpdType.off)
DENSE = DivergenceConfig(kind=DivergenceKind.forward_kl)
RAGGED = [[1, 1, 1], [1, 0, 1, 1, 1], [1], [1, 1, 0, 1], [1, 1], [1, 1, 1, 1, 1, 1]]


def updated(batch: TokenBatch, log_probs: Tensor, teacher: Tensor | None = None) -> UpdateResult:
    return UpdateResult(
        log_probs=log_probs,
        entropy=torch.where(batch.mask, 0.25, NAN),
        teacher=teacher,
        loss=0.5,
        grad_norm=2.0,
        learning_rate=1e-3,
        seconds={},
        packing_efficiency=1.0,
        num_micro_batches=1,
    )
