"""What is computed from whole distributions of student and teacher in a training worker: divergences, and how far their
likeliest tokens agree.

m = tokens whose prediction this rank's model output is, P = columns of this rank's part of the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ReduceOp

from opd_trainer.megatron.build import MegatronModel
from opd_trainer.megatron.micro_batch import MicroBatch, Scoring, forward_only
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.opd.overlap import OVERLAP_COLUMNS, overlap
from opd_trainer.protocols import Distribution, TeacherScores
from opd_trainer.types import TopK
from opd_trainer.updates import Divergence, Wants
from opd_trainer.vocabulary import VocabularyShards


@dataclass(frozen=True, slots=True)
class HeldDistribution:
    """A `Distribution`: a frozen model's hidden states, from which its head makes logits a piece at a time.

    Attributes:
        model: its weights must stay where they are as long as this is used.
        hidden: [r, hidden size].
    """

    model: MegatronModel
    hidden: Tensor

    @property
    def vocab_size(self) -> int:
        """See `Distribution`."""
        return self.model.architecture.vocab_size

    def logits(self, rows: slice) -> Tensor:
        """See `Distribution`."""
        with torch.no_grad():
            return self.model.logits(self.hidden[rows])


def read(model: MegatronModel, micro_batch: MicroBatch, scoring: Scoring, wants: Wants) -> TeacherScores:
    """What a frozen model tells about a micro-batch, in one forward pass without gradient."""

    def tell(hidden: Tensor) -> TeacherScores:
        logits = model.logits(hidden)
        return TeacherScores(
            log_probs=micro_batch.scatter(scoring(model, logits, micro_batch.targets)[0]),
            tokens=micro_batch.own,
            topk=candidates(model, logits, wants.top_k, scoring) if wants.top_k else None,
            distribution=HeldDistribution(model, hidden) if wants.divergence is not None else None,
            flop=micro_batch.forward_flop(model.architecture),
        )

    told = forward_only(model, micro_batch, tell, head=False)
    return TeacherScores(log_probs=micro_batch.unknown(), tokens=micro_batch.own[:0]) if told is None else told


def candidates(model: MegatronModel, logits: Tensor, k: int, scoring: Scoring) -> TopK:
    """The k likeliest tokens at each position, likeliest first, with their log-probs."""
    ids, chosen = _likeliest(model, logits, k, scoring)
    first, _ = scoring(model, logits, ids[:, 0])
    scaled = chosen / scoring.temperature
    return TopK(ids=ids, log_probs=scaled - scaled[:, :1] + first[:, None])


def _likeliest(model: MegatronModel, logits: Tensor, k: int, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Ids i64[m, k] of the largest logits of each position, largest first, and those logits f32[m, k]; one chunk of
    positions at a time is in fp32."""
    shards = vocabulary_of(model.runtime, logits.shape[1])
    pieces = []
    for piece in logits.detach().split(scoring.chunk_tokens):
        known = _without_padding(piece.float(), shards, model.architecture.vocab_size)
        ids = shards.top(known, k)
        pieces.append((ids, shards.at(known, ids)))
    ids, chosen = (torch.cat(part) for part in zip(*pieces, strict=True))
    return ids, chosen


def divergences(
    model: MegatronModel,
    logits: Tensor,
    micro_batch: MicroBatch,
    evidence: Sequence[TeacherScores],
    divergence: Divergence,
    scoring: Scoring,
) -> Tensor:
    """f32[m], the divergence of the student's distributions from the teachers', 0 where no teacher scored.

    Positions are computed in chunks, each with its gradient: only one chunk of either model is in fp32 at a time, and
    the backward pass computes nothing anew.

    Args:
        model: the student.
        logits: [m, P] of the student.
        micro_batch: what they are about.
        evidence: of the teachers.
        divergence: which one.
        scoring: temperature and size of a chunk.
    """
    shards = vocabulary_of(model.runtime, logits.shape[1])
    found = torch.zeros(len(logits), device=logits.device)
    for scores in evidence:
        distribution = scores.distribution
        if distribution is None or not len(scores.tokens):
            continue
        rows = torch.searchsorted(micro_batch.own, scores.tokens)
        common = min(model.architecture.vocab_size, distribution.vocab_size)
        chunk = partial(
            _chunk,
            sampled=micro_batch.targets[rows],
            distribution=distribution,
            common=common,
            shards=shards,
            divergence=divergence,
            temperature=scoring.temperature,
        )
        found = found.index_copy(0, rows, ByRow.apply(logits, rows, chunk, scoring.chunk_tokens))
    return found


class ByRow(torch.autograd.Function):
    """f32[r], a function of each of some rows of logits, a chunk of them at a time, with the gradient of each row.

    The gradient is kept in the dtype of the logits, of which it is as large as the part that is asked about; it becomes
    the gradient of the logits, so that no more memory is needed at the peak than without it.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Tensor, function: Callable[[Tensor, slice], Tensor], chunk_tokens: int
    ) -> Tensor:
        """`function` of `logits[rows]`, given which of the rows a chunk is."""
        values = torch.empty(len(rows), device=logits.device)
        gradient = logits.new_empty(len(rows), logits.shape[1])
        for start in range(0, len(rows), chunk_tokens):
            piece = slice(start, start + chunk_tokens)
            with torch.enable_grad():
                chunk = logits.detach()[rows[piece]].requires_grad_()
                found = function(chunk, piece)
                (gradient[piece],) = torch.autograd.grad(found.sum(), chunk)
            values[piece] = found.detach()
        ctx.rows, ctx.count, ctx.gradient = rows, len(logits), gradient
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Each row's gradient, times what arrives for its value. Once only: memory is used again."""
        (grad_values,) = grads
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "the gradient was handed out before"
        gradient.mul_(grad_values[:, None])
        # A row that does not count must not matter even where its gradient is not finite.
        gradient[grad_values == 0] = 0
        if len(ctx.rows) < ctx.count:
            gradient = gradient.new_zeros(ctx.count, gradient.shape[1]).index_copy_(0, ctx.rows, gradient)
        return gradient, None, None, None


def _chunk(
    student: Tensor,
    rows: slice,
    *,
    sampled: Tensor,
    distribution: Distribution,
    common: int,
    shards: VocabularyShards,
    divergence: Divergence,
    temperature: float,
) -> Tensor:
    """The divergence of `rows` of the positions that a teacher scored; ids that one of the models lacks take no
    probability in either.
    """
    teacher = distribution.logits(rows)
    columns = min(student.shape[1], teacher.shape[1])
    own, theirs = (
        _without_padding(logits[:, :columns].float(), shards, common) / temperature for logits in (student, teacher)
    )
    return divergence(own, theirs, sampled[rows], shards)


def overlaps(
    model: MegatronModel,
    logits: Tensor,
    micro_batch: MicroBatch,
    evidence: Sequence[TeacherScores],
    k: int,
    scoring: Scoring,
) -> Tensor:
    """f32[m, 3], see `opd_trainer.opd.overlap.overlap`; NaN where no teacher scored."""
    found = torch.full((len(logits), OVERLAP_COLUMNS), torch.nan, device=logits.device)
    if not evidence:
        return found
    ids, _ = _likeliest(model, logits, k, scoring)
    for scores in evidence:
        if scores.topk is not None:
            rows = torch.searchsorted(micro_batch.own, scores.tokens)
            found[rows] = overlap(ids[rows], scores.topk)
    return found


def _without_padding(logits: Tensor, shards: VocabularyShards, vocab_size: int) -> Tensor:
    """-inf for the ids from `vocab_size` on."""
    ids = torch.arange(shards.first, shards.first + logits.shape[1], device=logits.device)
    return logits.masked_fill(ids >= vocab_size, -torch.inf)


def vocabulary_of(runtime: MegatronRuntime, columns: int) -> VocabularyShards:
    """How the tensor-parallel ranks reach each other's `columns` of the vocabulary."""
    if runtime.tp_size == 1:
        return VocabularyShards()
    from megatron.core.tensor_parallel import mappings

    group = runtime.tp_group

    def largest(x: Tensor) -> Tensor:
        distributed.all_reduce(x, ReduceOp.MAX, group=group)
        return x

    def gather(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(runtime.tp_size)]
        distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, -1)

    return VocabularyShards(
        first=runtime.tp_rank * columns,
        total=lambda x: mappings.reduce_from_tensor_model_parallel_region(x, group),
        copy=lambda x: mappings.copy_to_tensor_model_parallel_region(x, group),
        largest=largest,
        gather=gather,
    )
