"""Supervised fine-tuning as a run of the same loop: rows for rollouts, log-likelihood for advantages.

N = rows of a step, T = their tokens (prompt, response and end-of-sequence) laid end to end.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from opd_trainer import jagged
from opd_trainer.data.stream import PromptStream
from opd_trainer.errors import DataError
from opd_trainer.loss.nll import NegativeLogLikelihood
from opd_trainer.metrics import Metrics
from opd_trainer.protocols import TokenLoss
from opd_trainer.tracking.tracker import StepLog
from opd_trainer.types import Prompt, Request, Sample, Sampling, Scores, TokenBatch, WeightStream
from opd_trainer.updates import UpdateResult


class Encode(Protocol):
    """Text -> token ids without special tokens."""

    def __call__(self, text: str) -> list[int]:
        """The ids of `text`."""
        ...


@dataclass(slots=True)
class SupervisedExperience:
    """Rows of a dataset whose column `response_key` holds the response to learn."""

    stream: PromptStream
    encode: Encode
    eos_token_id: int
    response_key: str
    batch_size: int

    async def next(self, step: int, log: StepLog) -> TokenBatch:
        """The next rows, with the response and its end-of-sequence token unmasked."""
        prompts = self.stream.next(self.batch_size)
        responses = [self._response(prompt) for prompt in prompts]
        lengths = torch.tensor([len(p.tokens) + len(r) for p, r in zip(prompts, responses, strict=True)])
        pairs = list(zip(prompts, responses, strict=True))
        num_tokens = int(lengths.sum())
        return TokenBatch(
            tokens=torch.cat([part for p, r in pairs for part in (p.tokens, r)]),
            seq=jagged.seq_from_lengths(lengths),
            mask=torch.cat(
                [part for p, r in pairs for part in (torch.zeros(len(p.tokens)), torch.ones(len(r)))]
            ).bool(),
            group=torch.arange(len(prompts)),
            reward=torch.full((len(prompts),), float("nan")),
            truncated=torch.zeros(len(prompts), dtype=torch.bool),
            teacher_name=tuple(p.teacher for p in prompts),
            rollout=Scores(log_probs=torch.full((num_tokens,), float("nan")), temperature=1.0, model="none"),
            version=torch.full((len(prompts),), step),
        )

    def _response(self, prompt: Prompt) -> torch.Tensor:
        response = prompt.metadata.get(self.response_key)
        if not isinstance(response, str):
            raise DataError(
                f"row {prompt.id} has no text in column {self.response_key!r}: supervised fine-tuning needs a response "
                "to learn. Set task.response_key to the column that holds it"
            )
        return torch.tensor([*self.encode(response), self.eos_token_id])

    def state_dict(self) -> dict[str, Any]:
        """The cursor into the rows."""
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.stream.load_state_dict(state["stream"])


@dataclass(slots=True)
class SupervisedObjective:
    """Mean negative log-likelihood over the unmasked tokens of a step."""

    @property
    def needs(self) -> frozenset[str]:
        """Nothing is scored beforehand."""
        return frozenset()

    def assign(self, batch: TokenBatch) -> TokenBatch:
        """Every unmasked token weighs the same."""
        weight = batch.mask.float() / batch.mask.sum()
        return batch.replace(weight=weight)

    def minibatches(self, batch: TokenBatch) -> Sequence[TokenBatch]:
        """One optimizer step a batch."""
        return [batch]

    def loss(self) -> TokenLoss:
        """-log_probs."""
        return NegativeLogLikelihood()

    def metrics(self, batch: TokenBatch, result: UpdateResult) -> Metrics:
        """Loss, perplexity's logarithm and optimizer figures."""
        metrics = Metrics().put("train/loss", result.loss)
        metrics.put("train/grad_norm", result.grad_norm).put("train/lr", result.learning_rate)
        return metrics.mean("train/entropy", result.entropy, batch.mask)

    def state_dict(self) -> dict[str, Any]:
        """Stateless."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stateless."""


class NoRollout:
    """The engine of a run that generates nothing: weights are never pulled."""

    async def start(self) -> None:
        """Nothing to start."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> AsyncIterator[Sample]:
        """Never asked."""
        raise AssertionError("a supervised run generates nothing")

    async def load(self, weights: WeightStream) -> None:
        """Leaves the stream untouched."""

    async def close(self) -> None:
        """Nothing to close."""
