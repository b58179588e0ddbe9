"""The seams. Implementations import these and never each other; `build` and `task` wire them together."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from opd_trainer.metrics import Metrics
from opd_trainer.types import ModelIdentity, Request, Sample, Sampling, Signal, TokenBatch, TopK, WeightStream
from opd_trainer.updates import Live, UpdateResult, Wants


class RolloutEngine(Protocol):
    """Something that answers prompts with the student's current weights."""

    async def start(self) -> None:
        """Brings it up; nothing is allocated before."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> AsyncIterator[Sample]:
        """Yields each sample as it finishes, in any order; the same request and weights give the same sample."""
        ...

    async def load(self, weights: WeightStream) -> None:
        """Takes new weights under their Hugging Face names; later samples carry `weights.version`."""
        ...

    def asleep(self) -> AbstractAsyncContextManager[None]:
        """Its device memory is free inside, where it is shared with the learner; `load` takes back what it needs."""
        ...

    def metrics(self) -> Metrics:
        """What happened since the last call."""
        ...

    async def close(self) -> None:
        """Releases everything. Safe to call twice."""
        ...


class TokenLoss(Protocol):
    """A picklable per-token loss that a training worker evaluates on a micro-batch."""

    @property
    def wants(self) -> Wants:
        """What it needs beside log-probs of the sampled tokens."""
        ...

    def __call__(self, live: Live, batch: TokenBatch) -> Tensor:
        """Per-token loss [T], finite everywhere, 0 where masked."""
        ...


class Distribution(Protocol):
    """What a frozen model says about whole vocabularies at some positions, computed a piece at a time."""

    @property
    def vocab_size(self) -> int:
        """Ids that mean something."""
        ...

    def logits(self, rows: slice) -> Tensor:
        """[rows, columns of this rank] in the weights' dtype, without gradient."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """What an inline teacher tells about a micro-batch of T tokens.

    Attributes:
        log_probs: f32[T] of the tokens with mask True, NaN elsewhere.
        tokens: i64[r], the tokens that the rest is about, ascending: those with mask True whose prediction this rank
            computes.
        topk: [r, k] candidates, for `Signal.topk`.
        distribution: of r positions, for `Signal.full_vocab`.
        flop: floating-point operations of the forward pass, of all ranks that shared it; 0 where nothing was computed,
            and on pipeline stages before the last.
    """

    log_probs: Tensor
    tokens: Tensor
    topk: TopK | None = None
    distribution: Distribution | None = None
    flop: int = 0


class InlineTeacher(Protocol):
    """A teacher that lives in the training worker and scores a micro-batch inside the training forward pass."""

    @property
    def signals(self) -> frozenset[Signal]:
        """What it can tell."""
        ...

    @property
    def identity(self) -> ModelIdentity:
        """Who it is."""
        ...

    def ready(self) -> AbstractContextManager[None]:
        """Its weights are where it can score, inside; the student's are away where the two share a module."""
        ...

    def score_inline(self, micro_batch: TokenBatch, wants: Wants) -> TeacherScores:
        """What the teacher tells about the micro-batch's tokens with mask True. Inside `ready`."""
        ...

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Its weights as (Hugging Face name, full tensor); collective, only rank 0 gets tensors."""
        ...


class Learner(Protocol):
    """The student with its optimizer, and what lives beside it: reference, critic, inline teachers."""

    async def start(self) -> None:
        """Builds workers and loads weights."""
        ...

    def awake(self) -> AbstractAsyncContextManager[None]:
        """Weights and optimizer are on the device inside; a no-op unless devices are shared."""
        ...

    async def score(self, batch: TokenBatch, model: str) -> Tensor:
        """Forward-only log-probs f32[T] of `batch` under "student", "reference", "teacher:<name>" or "teacher": each
        sequence's own.

        Fields of a batch name their model too: "old" is the student, "values" the critic (values f32[T]).
        """
        ...

    async def update(self, batch: TokenBatch, loss: TokenLoss) -> UpdateResult:
        """Exactly one optimizer step on sum_t weight[t] * loss[t]; inline teachers are scored on the way.

        A critic takes a step of its own on sum_t weight[t] * value loss[t], towards `batch.returns`.
        """
        ...

    def weights(self, version: int, model: str = "student") -> WeightStream:
        """The weights of "student" or "teacher:<name>", under Hugging Face names; read before the next update."""
        ...

    async def save(self, directory: Path, *, background: bool = False) -> None:
        """Writes weights, optimizer, scheduler and RNG into `directory`, which exists and is empty.

        With `background` it returns as soon as the state is copied, and `finish_save` completes what was written.
        """
        ...

    async def finish_save(self, *, wait: bool) -> bool:
        """Completes a save in the background, if it is written or `wait` is set; whether none is under way any more."""
        ...

    async def restore(self, directory: Path) -> None:
        """The inverse of `save`."""
        ...

    async def export(self, directory: Path) -> None:
        """Writes the student as a Hugging Face folder."""
        ...

    async def close(self) -> None:
        """Tears down workers, process groups and patches completely. Safe to call twice."""
        ...


class WorkerGroup(Protocol):
    """N workers of one class, one per rank; every call has a timeout."""

    @property
    def size(self) -> int:
        """Number of workers."""
        ...

    async def start(self) -> None:
        """Creates the workers, and calls `start` on each."""
        ...

    async def call(self, method: str, *args: Any) -> list[Any]:
        """Calls `method` with the same arguments on every worker at once; results by rank.

        Raises:
            WorkerError: a worker raised, died or did not answer in time.
        """
        ...

    async def call_each(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Calls `method` with arguments of its own on each worker at once; results by rank."""
        ...

    async def close(self) -> None:
        """Calls `close` on each worker and ends it. Safe to call twice."""
        ...


class Reward(Protocol):
    """A task reward."""

    async def __call__(self, sample: Sample, group_size: int) -> dict[str, float]:
        """Parts of the reward by name; "reward" is the total. Raises on failure, which is never turned into 0.

        `group_size` samples of the same prompt are asked about, at about the same time.
        """
        ...

    async def close(self) -> None:
        """Releases processes and connections. Safe to call twice."""
        ...
