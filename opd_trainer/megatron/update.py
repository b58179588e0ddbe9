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
from opd_trainer.megatron.micro_batch import MicroBatch, Scoring, prepare
from opd_trainer.protocols import InlineTeacher, TokenLoss
from opd_trainer.types import Scores, Signal, TokenBatch


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
        loss: sum of weight * loss.
        teacher_s: seconds that inline teachers took.
    """

    log_probs: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    teacher: list[Tensor] = field(default_factory=list)
    loss: float = 0.0
    teacher_s: float = 0.0


def score_inline(
    teachers: Mapping[str, InlineTeacher], batches: Sequence[TokenBatch], *, all_asked: bool
) -> list[TokenBatch]:
    """Fills in the teacher's log-probs of the sequences whose teacher is one of `teachers` and that have none yet.

    Each teacher is made ready once and scores all of its micro-batches: bringing its weights may take long.

    Args:
        teachers: by name.
        batches: micro-batches.
        all_asked: whether teachers that have nothing to score take part too: other ranks may wait for them.

    Returns:
        The micro-batches with `teacher` set: NaN where no teacher scored.
    """
    scored = [_with_scores(batch) for batch in batches]
    for name, teacher in teachers.items():
        if not all_asked and not any(bool(_wanted(name, batch).any()) for batch in scored):
            continue
        with teacher.ready():
            scored = [_filled(name, teacher, batch, all_asked=all_asked) for batch in scored]
    return scored


def _with_scores(batch: TokenBatch) -> TokenBatch:
    if batch.teacher is not None:
        return batch
    unknown = torch.full((batch.num_tokens,), torch.nan, device=batch.tokens.device)
    return batch.replace(teacher=Scores(log_probs=unknown, temperature=batch.rollout.temperature, model="teacher"))


def _sequences(name: str, batch: TokenBatch) -> list[int]:
    return [i for i, named in enumerate(batch.teacher_name) if named == name]


def _tokens(name: str, batch: TokenBatch) -> Tensor:
    """[T], whether a token's sequence has this teacher."""
    mine = torch.zeros(batch.num_sequences, dtype=torch.bool, device=batch.tokens.device)
    mine[_sequences(name, batch)] = True
    return mine[batch.seq]


def _wanted(name: str, batch: TokenBatch) -> Tensor:
    """[T], the tokens that this teacher has to score."""
    assert batch.teacher is not None
    return batch.mask & batch.teacher.log_probs.isnan() & _tokens(name, batch)


def _filled(name: str, teacher: InlineTeacher, batch: TokenBatch, *, all_asked: bool) -> TokenBatch:
    """The batch with the scores of one teacher."""
    wanted, known = _wanted(name, batch), batch.teacher
    assert known is not None
    if not all_asked and not bool(wanted.any()):
        return batch
    # The whole micro-batch when it is all theirs, so that teacher and student compute the same shapes.
    part, theirs = batch.replace(mask=wanted), _sequences(name, batch)
    part = part if len(theirs) == batch.num_sequences else part.take(theirs)
    scored = teacher.score_inline(part, Signal.sampled).to(known.log_probs.dtype)
    log_probs = known.log_probs.masked_scatter(_tokens(name, batch), scored).where(wanted, known.log_probs)
    return batch.replace(teacher=dataclasses.replace(known, log_probs=log_probs))


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
        if self.teachers:
            prepared = self._with_teachers(list(prepared), outcome)

        def share(number: int, micro_batch: MicroBatch, logits: Tensor | None) -> Tensor:
            total = self._loss(logits, micro_batch, loss, outcome)
            if not bool(total.isfinite()):
                raise TrainingDiverged(_describe(step, number, micro_batch, outcome))
            outcome.loss += float(total.detach())
            return total

        forward_backward(self.model, self.chunks, micro_batches, prepared, share)
        return outcome

    def _with_teachers(self, micro_batches: Sequence[MicroBatch], outcome: Outcome) -> list[MicroBatch]:
        watch = Stopwatch(self.model.runtime.device)
        all_asked = self.model.runtime.ep_size > 1
        batches = score_inline(self.teachers, [micro_batch.batch for micro_batch in micro_batches], all_asked=all_asked)
        outcome.teacher = [batch.teacher.log_probs.cpu() for batch in batches if batch.teacher is not None]
        outcome.teacher_s = watch.lap()
        return [dataclasses.replace(m, batch=batch) for m, batch in zip(micro_batches, batches, strict=True)]

    def _loss(self, logits: Tensor | None, micro_batch: MicroBatch, loss: TokenLoss, outcome: Outcome) -> Tensor:
        batch = micro_batch.batch
        assert batch.weight is not None, "loss weights are fixed on the controller"
        if logits is None:
            unknown = micro_batch.unknown().cpu()
            outcome.log_probs.append(unknown)
            outcome.entropy.append(unknown)
            return torch.zeros((), device=micro_batch.index.device)
        scored, entropies = self.scoring(
            self.model, logits, micro_batch.targets, entropy_gradient=loss.needs_entropy_gradient
        )
        log_probs, entropy = micro_batch.scatter(scored), micro_batch.scatter(entropies)
        outcome.log_probs.append(log_probs.detach().cpu())
        outcome.entropy.append(entropy.detach().cpu())
        return (batch.weight * loss(log_probs, entropy, batch)).sum()


def _describe(step: int, number: int, micro_batch: MicroBatch, outcome: Outcome) -> str:
    live = outcome.log_probs[-1][micro_batch.index.cpu()]
    bad = int((~live.isfinite()).sum())
    cause = (
        f"{bad} of {len(live)} live log-probs are not finite: the weights or activations overflowed"
        if bad
        else "the live log-probs are finite: advantages, teacher log-probs or old log-probs are not"
    )
    return f"optimizer step {step}, micro-batch {number}: the loss is not finite; {cause}. The step was not taken"
