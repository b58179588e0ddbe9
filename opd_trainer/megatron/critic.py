"""PPO's critic: a value model with an optimizer of its own, in the worker of the student and in its parallel layout.

T = tokens of a micro-batch, M = those with mask True. The value of token t is that of the prefix before it: it is read
where the student predicts the token.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from opd_trainer.errors import TrainingDiverged
from opd_trainer.loss.value import ValueLoss
from opd_trainer.megatron import checkpoint
from opd_trainer.megatron.backward import forward_backward
from opd_trainer.megatron.huggingface import describe
from opd_trainer.megatron.micro_batch import MicroBatch, forward_only, prepare
from opd_trainer.megatron.optimizer import Optimizer, wrap
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.megatron.saving import Saving
from opd_trainer.megatron.source import LoadedModel, load_model
from opd_trainer.megatron.spec import RankCritic, WorkerSpec
from opd_trainer.types import TokenBatch

FOLDER = "critic"
"""Of the critic's checkpoint, inside the student's."""


@dataclass(frozen=True, slots=True)
class Critic:
    """A value model that is trained. Every method is collective: call it on all ranks.

    Attributes:
        loaded: the model.
        chunks: its modules with their gradient buffers.
        optimizer: of its own.
        loss: of a token's value.
    """

    loaded: LoadedModel
    chunks: Sequence[Any]
    optimizer: Optimizer
    loss: ValueLoss

    @classmethod
    def load(cls, runtime: MegatronRuntime, spec: WorkerSpec) -> "Critic":
        """Builds the critic of a worker's specification, which has one.

        Raises:
            UserError: it cannot be loaded, or cannot be cut into the student's parallel layout.
        """
        assert spec.critic is not None
        settings = dataclasses.replace(spec.megatron, optimizer=spec.critic.optimizer)
        loaded = load_model(
            runtime, spec.critic.model, settings, vocab_size=spec.vocab_size, trainable=True, value_head=True
        )
        chunks = wrap(loaded.model.modules, settings)
        optimizer = Optimizer(chunks, settings, spec.total_steps, key="critic.optimizer")
        return cls(loaded, chunks, optimizer, spec.critic.loss)

    def values(self, micro_batch: MicroBatch) -> Tensor:
        """Values f32[T] without gradient, NaN where the mask is False."""
        values = forward_only(self.loaded.model, micro_batch, lambda output: output.squeeze(1))
        return micro_batch.unknown() if values is None else micro_batch.scatter(values)

    def update(self, micro_batches: Sequence[TokenBatch]) -> RankCritic:
        """One optimizer step on the sum of weight * value loss over the micro-batches of all data-parallel ranks.

        Args:
            micro_batches: of this data-parallel rank, with `values` and `returns`.

        Raises:
            TrainingDiverged: a loss or gradient is not finite.
        """
        values: list[Tensor] = []
        losses: list[float] = []
        prepared = (prepare(batch, self.loaded.model.runtime) for batch in micro_batches)

        def share(number: int, micro_batch: MicroBatch, output: Tensor | None) -> Tensor:
            live = micro_batch.unknown() if output is None else micro_batch.scatter(output.squeeze(1))
            values.append(live.detach().cpu())
            total = _loss(self.loss, live, micro_batch.batch)
            if not bool(total.isfinite()):
                raise TrainingDiverged(_describe(self.optimizer.num_steps, number, values[-1][micro_batch.index.cpu()]))
            losses.append(float(total.detach()))
            return total

        self.optimizer.zero_grad()
        forward_backward(self.loaded.model, self.chunks, micro_batches, prepared, share)
        stepped = self.optimizer.step()
        return RankCritic(
            values=values, loss=sum(losses), grad_norm=stepped.grad_norm, learning_rate=stepped.learning_rate
        )

    def begin_save(self, directory: Path, *, background: bool) -> Saving:
        """Begins to write the critic's state beside the student's in `directory`; it can be loaded as a critic."""
        folder = directory / FOLDER
        folder.mkdir(exist_ok=True)
        return checkpoint.begin_save(folder, self.loaded.model, self.optimizer, background=background)

    def describe(self, directory: Path) -> None:
        """Adds config.json and tokenizer to what `begin_save` writes."""
        describe(self.loaded.model, directory / FOLDER, self.loaded.folder)

    def restore(self, directory: Path) -> None:
        """The inverse of `begin_save`.

        Raises:
            CheckpointError: `directory` holds no critic of this shape.
        """
        checkpoint.restore(directory / FOLDER, self.loaded.model, self.optimizer)


def _loss(loss: ValueLoss, live: Tensor, batch: TokenBatch) -> Tensor:
    assert batch.weight is not None
    assert batch.values is not None
    assert batch.returns is not None
    return (batch.weight * loss(live, batch.values, batch.returns, batch.mask)).sum()


def _describe(step: int, number: int, live: Tensor) -> str:
    bad = int((~live.isfinite()).sum())
    cause = (
        f"{bad} of {len(live)} live values are not finite: the weights or activations overflowed. Restart from the "
        "last checkpoint with a lower critic.optimizer.lr"
        if bad
        else "the live values are finite: rewards, and with them returns, are not. Look at the rewards"
    )
    return f"critic step {step}, micro-batch {number}: the value loss is not finite; {cause}"
