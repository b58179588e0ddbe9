"""The glossary: every noun that crosses a seam.

T = tokens of all sequences laid end to end, N = sequences, P = prompt tokens, R = response tokens.
Index t describes token t: ``log_probs[t] = log p(token t | tokens before t)``. Unknown is NaN, never 0 (0.0 would be
probability 1). `mask` alone says which tokens the policy chose.
"""

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from opd_trainer import jagged
from opd_trainer.errors import Incomparable


class Finish(StrEnum):
    """Why a response ended."""

    stop = auto()
    """The model produced a stop token (kept as the last response token)."""
    length = auto()
    """The response reached its maximum length."""
    abort = auto()
    """The engine gave up on it; the sample is dropped and counted."""


class ScoreStatus(StrEnum):
    """What became of one sequence's scoring by a teacher."""

    ok = auto()
    timeout = auto()
    http_error = auto()
    too_long = auto()
    misaligned = auto()
    nonfinite = auto()
    refused = auto()


class Signal(StrEnum):
    """What a teacher can tell about a position."""

    sampled = auto()
    """The log-prob of the sampled token."""
    topk = auto()
    """The k likeliest tokens with their log-probs."""
    full_vocab = auto()
    """The whole distribution; exists only on the device that holds the logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of a dataset, rendered and tokenised.

    Attributes:
        id: stable over runs and epochs; keys randomness and caches.
        tokens: i64[P], at least one token.
        text: the rendered prompt, for people.
        answer: what the reward compares with; None where a dataset has none.
        dataset: name of the dataset it came from.
        teacher: name of the teacher that scores its responses.
        metadata: everything else of the row, for custom rewards.
    """

    id: str
    tokens: Tensor
    text: str
    answer: str | None = None
    dataset: str = "train"
    teacher: str = "default"
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn. `temperature` 0 is greedy; `log_prob_top_k` > 0 asks for `Sample.topk`."""

    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int
    stop_token_ids: tuple[int, ...]
    log_prob_top_k: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The k likeliest tokens at each of R positions, likeliest first.

    Attributes:
        ids: i64[R, k].
        log_probs: f32[R, k].
    """

    ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One response to generate. `seed` fixes its randomness, whatever else is in the batch.

    Attributes:
        prompt: what to answer.
        index: which sibling of the prompt this is, from 0.
        seed: derived from (run seed, step, prompt id, index), see `opd_trainer.requests.request_seed`.
    """

    prompt: Prompt
    index: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response and what became of it.

    Attributes:
        prompt: the prompt that was answered.
        index: which sibling of the prompt this is.
        response: i64[R] token ids, R >= 0; a stop token is included.
        log_probs: f32[R] behaviour log-probs at the sampling temperature, before top-p/top-k truncation.
        finish: why it ended.
        version: policy version of the weights that sampled it.
        text: the decoded response without special tokens.
        reward: NaN until scored.
        reward_parts: the parts of a composite reward, and its failure if it failed.
        teacher_log_probs: f32[R] of a teacher that scores sample by sample, on a server or on workers of its own (NaN =
            unknown); None when none scored it.
        teacher_temperature: the temperature that its logits were divided by.
        teacher_status: what became of that scoring.
        topk: the engine's candidates at each response position; None unless asked for.
        teacher_topk: those of a server teacher; None unless asked for, or where its scoring failed.
    """

    prompt: Prompt
    index: int
    response: Tensor
    log_probs: Tensor
    finish: Finish
    version: int
    text: str
    reward: float = float("nan")
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    teacher_log_probs: Tensor | None = None
    teacher_temperature: float = float("nan")
    teacher_status: ScoreStatus = ScoreStatus.ok
    topk: TopK | None = None
    teacher_topk: TopK | None = None

    def replace(self, **changes: Any) -> "Sample":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Log-probs of the sampled tokens under one model; a log-prob knows its temperature and model.

    Attributes:
        log_probs: f32[T], NaN where unknown.
        temperature: the temperature that the logits were divided by.
        model: who computed it ("rollout", "student", "old", "reference", "teacher"), for messages.
    """

    log_probs: Float[Tensor, " T"]
    temperature: float
    model: str

    def take(self, index: Int64[Tensor, " S"]) -> "Scores":
        """The scores of the tokens at `index`."""
        return dataclasses.replace(self, log_probs=self.log_probs[index])

    def check_comparable(self, other: "Scores") -> None:
        """Refuses to compare log-probs of different distributions.

        Raises:
            Incomparable: the two were computed at different temperatures.
        """
        if self.temperature != other.temperature:
            raise Incomparable(
                f"log-probs of {self.model} at temperature {self.temperature} and of {other.model} at temperature "
                f"{other.temperature} describe different distributions; their difference means nothing"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """N sequences (prompt and response) laid end to end in [T]; immutable, extended with `replace`.

    Attributes:
        tokens: token ids.
        seq: the sequence of each token, 0..N-1, non-decreasing.
        mask: True on response tokens that the policy chose. The only authority.
        group: [N] the prompt group of each sequence (siblings share one).
        reward: [N] task reward, NaN where there is none.
        truncated: [N] the response ran into its length limit.
        teacher_name: N names of teachers.
        rollout: behaviour log-probs of the engine.
        version: [N] policy version that sampled each sequence.
        old: log-probs of the frozen policy at the start of the updates; None when the live policy is the old one.
        reference: log-probs of the reference model.
        teacher: log-probs of the teacher where scored before the update; None when it is scored inline.
        values: [T] the critic's value of the prefix before each token, frozen at the start of the updates.
        advantage: [T] base advantage, 0 where masked.
        returns: [T] critic targets.
        weight: [T] loss weight, 0 where masked; fixed for one optimizer step.
        opd_weight: [T] factor on the OPD term: 0 where the teacher is unknown, rescaled so that the term's mean is over
            the valid tokens (see `opd_trainer.opd`).
    """

    tokens: Int64[Tensor, " T"]
    seq: Int64[Tensor, " T"]
    mask: Bool[Tensor, " T"]
    group: Int64[Tensor, " N"]
    reward: Float[Tensor, " N"]
    truncated: Bool[Tensor, " N"]
    teacher_name: tuple[str, ...]
    rollout: Scores
    version: Int64[Tensor, " N"]
    old: Scores | None = None
    reference: Scores | None = None
    teacher: Scores | None = None
    values: Float[Tensor, " T"] | None = None
    advantage: Float[Tensor, " T"] | None = None
    returns: Float[Tensor, " T"] | None = None
    weight: Float[Tensor, " T"] | None = None
    opd_weight: Float[Tensor, " T"] | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.tokens)

    @property
    def num_sequences(self) -> int:
        """N."""
        return len(self.group)

    @property
    def lengths(self) -> Int64[Tensor, " N"]:
        """Tokens of each sequence, prompt included."""
        return jagged.lengths_of(self.seq, self.num_sequences)

    @property
    def positions(self) -> Int64[Tensor, " T"]:
        """Position of each token inside its sequence."""
        return jagged.positions(self.lengths)

    def replace(self, **changes: Any) -> "TokenBatch":
        """A shallow copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def scored(self, name: str, result: Float[Tensor, " T"]) -> "TokenBatch":
        """The batch with the field `name` set to what a model computed: the critic's "values", otherwise log-probs."""
        if name == "values":
            return self.replace(values=result)
        scores = Scores(log_probs=result, temperature=self.rollout.temperature, model=name)
        return self.replace(**{name: scores})

    def take(self, sequences: Sequence[int] | Tensor) -> "TokenBatch":
        """The batch of the given sequences, in that order; they are renumbered from 0."""
        chosen = torch.as_tensor(sequences, dtype=torch.int64)
        lengths = self.lengths
        index = jagged.token_index(lengths, chosen)
        changes: dict[str, Any] = {"seq": jagged.seq_from_lengths(lengths[chosen])}
        for name in ("tokens", "mask", "values", "advantage", "returns", "weight", "opd_weight"):
            value = getattr(self, name)
            changes[name] = None if value is None else value[index]
        for name in ("rollout", "old", "reference", "teacher"):
            value = getattr(self, name)
            changes[name] = None if value is None else value.take(index)
        for name in ("group", "reward", "truncated", "version"):
            changes[name] = getattr(self, name)[chosen]
        changes["teacher_name"] = tuple(self.teacher_name[i] for i in chosen.tolist())
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class WeightStream:
    """A model's weights on the way to an engine: buckets of (Hugging Face name, full tensor), bounded in bytes."""

    version: int
    buckets: AsyncIterator[list[tuple[str, Tensor]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What must agree before the log-probs of two models may be compared, and what tells two models apart.

    Attributes:
        path: where it was loaded from, for messages.
        weights: fingerprint of the weights.
        vocabulary: fingerprint of the token -> id map.
        vocab_size: number of rows of the output head that mean something.
        eos_token_ids: tokens that end a response.
        chat_template: fingerprint of the chat template, "" without one.
        max_length: context length, tokens.
    """

    path: str
    weights: str
    vocabulary: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    chat_template: str
    max_length: int
