"""One optimizer step across the seam: what a loss asks of the models in a worker, what they say, and what comes back.

T = tokens of a batch, R = positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from opd_trainer.types import Signal
from opd_trainer.vocabulary import VocabularyShards


@runtime_checkable
class Divergence(Protocol):
    """A divergence between the next-token distributions of student and teacher; picklable."""

    def __call__(self, student: Tensor, teacher: Tensor, sampled: Tensor, shards: VocabularyShards) -> Tensor:
        """Of R positions, f[R], differentiable in `student`.

        Args:
            student: [R, columns of this rank], logits over the temperature, -inf for ids that mean nothing.
            teacher: the same ids; no gradient flows into them.
            sampled: i64[R], the ids that the student sampled.
            shards: how to reach the columns of other ranks.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """What a loss needs of the models in a training worker, beside log-probs of the sampled tokens.

    Attributes:
        entropy_gradient: gradients flow through the student's entropy.
        top_k: candidates of student and teacher to compare at each position; 0 compares none.
        divergence: of student and inline teacher, differentiable.
    """

    entropy_gradient: bool = False
    top_k: int = 0
    divergence: Divergence | None = None

    @property
    def signals(self) -> frozenset[Signal]:
        """What inline teachers must be able to tell."""
        found = {Signal.sampled}
        if self.top_k:
            found.add(Signal.topk)
        if self.divergence is not None:
            found.add(Signal.full_vocab)
        return frozenset(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What the models in a training worker say about the tokens of a batch during an update; NaN where masked.

    Attributes:
        log_probs: [T] of the student.
        entropy: [T] of the student's distribution that produced token t, nats.
        divergence: [T] `Wants.divergence` of student and inline teacher; None when not asked for.
    """

    log_probs: Float[Tensor, " T"]
    entropy: Float[Tensor, " T"]
    divergence: Float[Tensor, " T"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticResult:
    """What the critic's part of one optimizer step returns to the controller, in the token order of the batch.

    Attributes:
        values: f32[T] live values before the step, NaN where the mask is False.
        loss: sum over all tokens of weight * value loss.
        grad_norm: global L2 norm before clipping.
        learning_rate: of this step.
    """

    values: Tensor
    loss: float
    grad_norm: float
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What one optimizer step returns to the controller, in the token order of the batch that was sent.

    Attributes:
        log_probs: f32[T] live student log-probs before the step, NaN on the first token of each sequence.
        entropy: f32[T] entropy of the student's distribution that produced token t, nats; NaN like `log_probs`.
        teacher: f32[T] log-probs of the inline teachers (NaN where none scored); None without inline teachers.
        divergence: f32[T] as `Wants.divergence` asked, 0 where no teacher scored; None when not asked for.
        overlap: f32[T, 3] of the candidates as `Wants.top_k` asked, see `opd_trainer.opd.overlap`, NaN where unknown;
            None when not asked for.
        loss: sum over all tokens of weight * loss.
        grad_norm: global L2 norm before clipping.
        learning_rate: of this step.
        seconds: wall seconds by phase ("teacher", "forward_backward", "optimizer", "critic"), slowest worker.
        packing_efficiency: tokens / tokens that all ranks could have computed while the fullest one did.
        num_micro_batches: per data-parallel rank.
        peak_memory_bytes: of the largest worker; 0 where the backend cannot tell.
        flop_per_worker: floating-point operations of the student and of inline teachers, the critic's left out, shared
            out among all workers.
        peak_flop_per_s: that a worker's device could do; None where that is not known.
        critic: of the critic's step; None without a critic.
    """

    log_probs: Tensor
    entropy: Tensor
    teacher: Tensor | None
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: Mapping[str, float]
    packing_efficiency: float
    num_micro_batches: int
    peak_memory_bytes: int = 0
    flop_per_worker: float = 0.0
    peak_flop_per_s: float | None = None
    divergence: Tensor | None = None
    overlap: Tensor | None = None
    critic: CriticResult | None = None

    @property
    def flop_per_s(self) -> float:
        """Of each worker, in the time of teachers, passes and step."""
        return self.flop_per_worker / sum(self.seconds[phase] for phase in ("teacher", "forward_backward", "optimizer"))

    @property
    def live(self) -> Live:
        """What the loss was computed from."""
        return Live(log_probs=self.log_probs, entropy=self.entropy, divergence=self.divergence)
