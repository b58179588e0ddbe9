"""Teachers that score the micro-batches of a training worker, just before the student does.

T = tokens of a micro-batch, r = tokens that a teacher tells more about than their log-prob, on this rank.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_trainer import jagged
from opd_trainer.protocols import InlineTeacher, TeacherScores
from opd_trainer.types import Scores, Signal, TokenBatch
from opd_trainer.updates import Wants


@dataclass(frozen=True, slots=True)
class Judged:
    """A micro-batch that inline teachers have scored.

    Attributes:
        batch: with `teacher` set: NaN where no teacher scored.
        evidence: what each teacher told beside; its `tokens` are those of `batch`.
        flop: of all teachers, see `TeacherScores`.
    """

    batch: TokenBatch
    evidence: tuple[TeacherScores, ...] = ()
    flop: int = 0


def score_inline(
    teachers: Mapping[str, InlineTeacher], batches: Sequence[TokenBatch], wants: Wants, *, all_asked: bool
) -> list[Judged]:
    """Fills in the teacher's log-probs of the sequences whose teacher is one of `teachers` and that have none yet.

    Each teacher is made ready once and scores all of its micro-batches: bringing its weights may take long.

    Args:
        teachers: by name.
        batches: micro-batches.
        wants: what they are asked for.
        all_asked: whether teachers that have nothing to score take part too: other ranks may wait for them.
    """
    judged = [Judged(_with_scores(batch)) for batch in batches]
    for name, teacher in teachers.items():
        if not all_asked and not any(bool(_wanted(name, one.batch).any()) for one in judged):
            continue
        with teacher.ready():
            judged = [_filled(name, teacher, one, wants, all_asked=all_asked) for one in judged]
    return judged


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


def _filled(name: str, teacher: InlineTeacher, judged: Judged, wants: Wants, *, all_asked: bool) -> Judged:
    """With what one teacher tells."""
    batch = judged.batch
    wanted, known = _wanted(name, batch), batch.teacher
    assert known is not None
    if not all_asked and not bool(wanted.any()):
        return judged
    # The whole micro-batch when it is all theirs, so that teacher and student compute the same shapes.
    part, theirs = batch.replace(mask=wanted), _sequences(name, batch)
    whole = len(theirs) == batch.num_sequences
    scored = teacher.score_inline(part if whole else part.take(theirs), wants)
    theirs_log_probs = scored.log_probs.to(known.log_probs.dtype)
    log_probs = known.log_probs.masked_scatter(_tokens(name, batch), theirs_log_probs).where(wanted, known.log_probs)
    if not whole:
        place = jagged.token_index(batch.lengths, torch.tensor(theirs, dtype=torch.int64, device=batch.tokens.device))
        scored = dataclasses.replace(scored, tokens=place[scored.tokens])
    return Judged(
        batch.replace(teacher=dataclasses.replace(known, log_probs=log_probs)),
        judged.evidence if wants.signals <= {Signal.sampled} else (*judged.evidence, scored),
        judged.flop + scored.flop,
    )
