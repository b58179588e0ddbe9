"""What a training worker is told: picklable, so that it travels to actors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from opd_trainer.loss.value import ValueLoss
from opd_trainer.megatron.config import MegatronConfig, OptimizerConfig, Placement
from opd_trainer.megatron.live_weights import LiveWeights
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.model.config import ModelConfig
from opd_trainer.protocols import InlineTeacher


class TeacherBuilder(Protocol):
    """A picklable recipe for an inline teacher."""

    def build(self, live: LiveWeights) -> InlineTeacher:
        """Builds the teacher beside the student, or into its module.

        Raises:
            UserError: it cannot be loaded, or does not fit.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticSpec:
    """A value model with its optimizer, beside the student.

    Attributes:
        model: where its weights come from.
        optimizer: settings of its own.
        loss: of a token's value.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    loss: ValueLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """A Megatron worker: the student with its optimizer, and the models beside it.

    Attributes:
        model: the student.
        vocab_size: ids of the tokenizer, for a student trained from scratch; None when it is loaded.
        megatron: parallel layout, micro-batches, optimizer.
        temperature: of all log-probs.
        seed: of initial weights.
        total_steps: optimizer steps of the run, for the learning-rate schedule.
        teachers: inline teachers by name.
        reference: the reference model; None when no KL to it is used.
        reference_placement: where its weights live.
        critic: the critic; None when no values are needed.
    """

    model: ModelConfig
    vocab_size: int | None
    megatron: MegatronConfig
    temperature: float
    seed: int
    total_steps: int
    teachers: Mapping[str, TeacherBuilder] = field(default_factory=dict)
    reference: ModelConfig | None = None
    reference_placement: Placement = Placement.resident
    critic: CriticSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A worker's place among the others.

    Attributes:
        dp_rank: data-parallel rank: which shard of a batch it computes.
        dp_size: data-parallel ranks.
        reports: whether its results stand for its data-parallel rank; False on tensor-parallel peers and on pipeline
            stages before the last.
    """

    dp_rank: int
    dp_size: int
    reports: bool


def place_of(runtime: MegatronRuntime) -> Place:
    """The place of a started worker."""
    return Place(
        dp_rank=runtime.dp_rank,
        dp_size=runtime.dp_size,
        reports=runtime.is_last_stage and runtime.tp_rank == 0 and runtime.cp_rank == 0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCritic:
    """One rank's part of the critic's optimizer step.

    Attributes:
        values: for each micro-batch f32[T] live values, NaN where the mask is False.
        loss: this data-parallel rank's share of the sum of weight * value loss.
        grad_norm: global L2 norm before clipping.
        learning_rate: of this step.
    """

    values: list[Tensor]
    loss: float
    grad_norm: float
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankUpdate:
    """One rank's part of an optimizer step.

    Attributes:
        log_probs: for each micro-batch f32[T] live log-probs, NaN where the mask is False.
        entropy: for each micro-batch f32[T], like `log_probs`.
        teacher: for each micro-batch f32[T] log-probs of the inline teachers; None without inline teachers.
        divergence: for each micro-batch f32[T], see `UpdateResult`; None when not asked for.
        overlap: for each micro-batch f32[T, 3], see `UpdateResult`; None when not asked for.
        loss: this data-parallel rank's share of the sum of weight * loss.
        grad_norm: global L2 norm before clipping.
        learning_rate: of this step.
        seconds: wall seconds by phase: "teacher", "forward_backward" (without the teacher), "optimizer", and "critic"
            where there is one.
        peak_memory_bytes: of the device; 0 where the backend cannot tell.
        flop: floating-point operations of the student's passes and of inline teachers', by all ranks that share the
            replica, where this one reports (see `Place`); see `opd_trainer.megatron.flop`.
        peak_flop_per_s: that the device could do; None where that is not known.
        critic: the critic's step; None without a critic.
    """

    log_probs: list[Tensor]
    entropy: list[Tensor]
    teacher: list[Tensor] | None
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: Mapping[str, float]
    peak_memory_bytes: int
    flop: int
    peak_flop_per_s: float | None
    divergence: list[Tensor] | None = None
    overlap: list[Tensor] | None = None
    critic: RankCritic | None = None
