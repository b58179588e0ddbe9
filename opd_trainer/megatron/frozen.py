"""A model beside the student that is never trained: a resident teacher, or the reference."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from opd_trainer.megatron.build import MegatronModel
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.micro_batch import MicroBatch, Scoring, score
from opd_trainer.megatron.optimizer import has_gradient_buffers
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.megatron.source import load_model
from opd_trainer.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class FrozenModel:
    """A loaded model without gradient or optimizer buffers.

    Attributes:
        model: its weights.
        scoring: how log-probs are computed.
    """

    model: MegatronModel
    scoring: Scoring

    @classmethod
    def load(cls, runtime: MegatronRuntime, settings: ModelConfig, megatron: MegatronConfig, scoring: Scoring) -> Self:
        """Builds the model with the architecture of its own checkpoint and loads it.

        Raises:
            UserError: it cannot be loaded.
        """
        model = load_model(runtime, settings, megatron, vocab_size=None, trainable=False).model
        assert not any(has_gradient_buffers(module) for module in model.modules), "a frozen model has no gradients"
        return cls(model, scoring)

    def score(self, micro_batch: MicroBatch) -> Tensor:
        """Log-probs f32[T] of a micro-batch, NaN where the mask is False; see `micro_batch.score`."""
        return score(self.model, micro_batch, self.scoring)
