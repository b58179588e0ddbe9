"""One forward and backward pass over the micro-batches of a data-parallel rank, inline teachers included."""

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opd_trainer.errors import TrainingDiverged
from opd_trainer.megatron.backward import forward_backward
from opd_trainer.megatron.build import MegatronModel
from opd_trainer.megatron.evidence import divergences, overlaps
from opd_trainer.megatron.flop import TRAINING
from opd_trainer.megatron.inline import score_inline
from opd_trainer.megatron.micro_batch import MicroBatch, Scoring, prepare
from opd_trainer.opd.overlap import OVERLAP_COLUMNS
from opd_trainer.protocols import InlineTeacher, TeacherScores, TokenLoss
from opd_trainer.types import TokenBatch
from opd_trainer.updates import Live, Wants


class Stopwatch:
    """Wall seconds of work on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or since the start."""
        since, self._since = self._since, self._now()
        return self._since - since


@dataclass(slots=True)
class Outcome:
    """What the forward and backward pass leaves behind; lists have one entry for each micro-batch that was computed.

    Attributes:
        log_probs: f32[T] on the CPU.
        entropy: f32[T] on the CPU.
        teacher: f32[T] on the CPU.
        divergence: f32[T] on the CPU; stays empty when the loss does not want it.
        overlap: f32[T, 3] on the CPU; stays empty when the loss does not want it.
        loss: sum of weight * loss.
        teacher_s: seconds that inline teachers took.
        flop: of inline teachers and of the student, backward pass included; see `RankUpdate`.
    """

    log_probs: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    teacher: list[Tensor] = field(default_factory=list)
    divergence: list[Tensor] = field(default_factory=list)
    overlap: list[Tensor] = field(default_factory=list)
    loss: float = 0.0
    teacher_s: float = 0.0
    flop: int = 0


@dataclass(frozen=True, slots=True)
class ForwardBackward:
    """The student's forward and backward pass.

    Attributes:
        model: the student.
        chunks: its modules, wrapped by `opd_trainer.megatron.optimizer.wrap`.
        scoring: how its log-probs are computed.
        teachers: inline teachers by name.
    """

    model: MegatronModel
    chunks: Sequence[Any]
    scoring: Scoring
    teachers: Mapping[str, InlineTeacher]

    def __call__(self, micro_batches: Sequence[TokenBatch], loss: TokenLoss, step: int) -> Outcome:
        """Leaves the gradient of the sum of weight * loss, summed over all ranks, in the chunks' buffers.

        Args:
            micro_batches: the same number on each rank.
            loss: of each token.
            step: optimizer step, for messages.

        Raises:
            TrainingDiverged: the loss of a micro-batch is not finite.
        """
        outcome = Outcome()
        prepared: Iterable[MicroBatch] = (prepare(batch, self.model.runtime) for batch in micro_batches)
        evidence: Sequence[tuple[TeacherScores, ...]] = [()] * len(micro_batches)
        if self.teachers:
            prepared, evidence = self._with_teachers(list(prepared), loss.wants, outcome)

        def share(number: int, micro_batch: MicroBatch, logits: Tensor | None) -> Tensor:
            total = self._loss(logits, micro_batch, evidence[number], loss, outcome)
            if not bool(total.isfinite()):
                raise TrainingDiverged(_describe(step, number, micro_batch, outcome))
            outcome.loss += float(total.detach())
            if logits is not None:
                outcome.flop += TRAINING * micro_batch.forward_flop(self.model.architecture)
            return total

        forward_backward(self.model, self.chunks, micro_batches, prepared, share)
        return outcome

    def _with_teachers(
        self, micro_batches: Sequence[MicroBatch], wants: Wants, outcome: Outcome
    ) -> tuple[list[MicroBatch], list[tuple[TeacherScores, ...]]]:
        watch = Stopwatch(self.model.runtime.device)
        all_asked = self.model.runtime.ep_size > 1
        batches = [micro_batch.batch for micro_batch in micro_batches]
        judged = score_inline(self.teachers, batches, wants, all_asked=all_asked)
        outcome.teacher = [one.batch.teacher.log_probs.cpu() for one in judged if one.batch.teacher is not None]
        outcome.teacher_s = watch.lap()
        outcome.flop += sum(one.flop for one in judged)
        scored = [dataclasses.replace(m, batch=one.batch) for m, one in zip(micro_batches, judged, strict=True)]
        return scored, [one.evidence for one in judged]

    def _loss(
        self,
        logits: Tensor | None,
        micro_batch: MicroBatch,
        evidence: Sequence[TeacherScores],
        loss: TokenLoss,
        outcome: Outcome,
    ) -> Tensor:
        batch = micro_batch.batch
        assert batch.weight is not None, "loss weights are fixed on the controller"
        live = self._live(logits, micro_batch, evidence, loss.wants, outcome)
        if live is None:
            return torch.zeros((), device=micro_batch.index.device)
        return (batch.weight * loss(live, batch)).sum()

    def _live(
        self,
        logits: Tensor | None,
        micro_batch: MicroBatch,
        evidence: Sequence[TeacherScores],
        wants: Wants,
        outcome: Outcome,
    ) -> Live | None:
        """What the models say about the tokens, recorded in `outcome`; None where nothing was to be computed."""
        if logits is None:
            unknown = micro_batch.unknown().cpu()
            outcome.log_probs.append(unknown)
            outcome.entropy.append(unknown)
            if wants.divergence is not None:
                outcome.divergence.append(unknown)
            if wants.top_k:
                outcome.overlap.append(micro_batch.unknown(OVERLAP_COLUMNS).cpu())
            return None
        scored, entropies = self.scoring(
            self.model, logits, micro_batch.targets, entropy_gradient=wants.entropy_gradient
        )
        log_probs, entropy = micro_batch.scatter(scored), micro_batch.scatter(entropies)
        outcome.log_probs.append(log_probs.detach().cpu())
        outcome.entropy.append(entropy.detach().cpu())
        if wants.top_k:
            overlap = overlaps(self.model, logits, micro_batch, evidence, wants.top_k, self.scoring)
            outcome.overlap.append(micro_batch.scatter(overlap).cpu())
        if wants.divergence is None:
            return Live(log_probs=log_probs, entropy=entropy)
        divergence = micro_batch.scatter(
            divergences(self.model, logits, micro_batch, evidence, wants.divergence, self.scoring)
        )
        outcome.divergence.append(divergence.detach().cpu())
        return Live(log_probs=log_probs, entropy=entropy, divergence=divergence)


def _describe(step: int, number: int, micro_batch: MicroBatch, outcome: Outcome) -> str:
    live = outcome.log_probs[-1][micro_batch.index.cpu()]
    bad = int((~live.isfinite()).sum())
    cause = (
        f"{bad} of {len(live)} live log-probs are not finite: the weights or activations overflowed. The step was not "
        "taken. Restart from the last checkpoint with a lower megatron.optimizer.lr"
        if bad
        else "the live log-probs are finite: advantages, divergences, or log-probs of teacher, reference or old policy "
        "are not. The step was not taken. Look at the rewards; a teacher may overflow in bfloat16"
    )
    return f"optimizer step {step}, micro-batch {number}: the loss is not finite; {cause}"
