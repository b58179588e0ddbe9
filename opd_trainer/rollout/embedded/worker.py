"""One embedded engine as a plain object: weights in, samples out; it knows neither asyncio nor Ray."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_trainer.errors import OpdError, UserError
from opd_trainer.rollout.config import EmbeddedRollout
from opd_trainer.rollout.embedded.generation import Generation, slots_needed
from opd_trainer.rollout.embedded.shape import DecoderShape
from opd_trainer.rollout.embedded.slots import Slots, bytes_per_slot
from opd_trainer.rollout.embedded.steps import StaticSteps
from opd_trainer.rollout.embedded.weights import DecoderWeights
from opd_trainer.types import Request, Sample, Sampling


@dataclass(frozen=True, slots=True)
class EmbeddedSpec:
    """What an embedded engine is made of; picklable.

    Attributes:
        config: the `transformers` configuration of the model.
        tokenizer: a `transformers` tokenizer, to decode responses.
        eos_token_ids: the model's own end-of-sequence tokens.
        rollout: sizes of the engine.
        dtype: number format of weights, keys and values.
        device: a torch device.
    """

    config: Any
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    rollout: EmbeddedRollout
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def make_worker(self, rank: int, size: int, rendezvous: str) -> "EmbeddedWorker":
        """A worker for a `WorkerGroup`; every rank is alike, and they do not talk to each other."""
        return EmbeddedWorker(self)

    def decode(self, responses: list[list[int]]) -> list[str]:
        """Texts of responses, without special tokens."""
        return self.tokenizer.batch_decode(responses, skip_special_tokens=True)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a worker finished since it was last asked.

    Attributes:
        samples: newly finished.
        done: nothing is left.
    """

    samples: list[Sample]
    done: bool


class EmbeddedWorker:
    """Loads weights, then generates: `begin` once, then `poll` until done.

    Args:
        spec: what it is made of.
    """

    def __init__(self, spec: EmbeddedSpec) -> None:
        self._spec = spec
        self._device = torch.device(spec.device)
        self._weights: DecoderWeights | None = None
        self._slots: Slots | None = None
        self._steps: dict[Sampling, StaticSteps] = {}
        self._version: int | None = None
        self._loading = False
        self._work: Iterator[list[Sample]] | None = None

    def start(self) -> None:
        """Allocates the weights.

        Raises:
            UserError: the embedded engine does not decode this model.
        """
        self._weights = DecoderWeights(DecoderShape.from_config(self._spec.config), self._spec.dtype, self._device)

    def load_bucket(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        """Copies some tensors of a new version in; until `commit` there is nothing to generate with.

        Raises:
            ShapeMismatch: a tensor that does not fit.
        """
        weights = self._idle("load weights")
        if not self._loading:
            weights.begin()
            self._loading, self._version = True, None
        try:
            weights.fill(bucket)
        except BaseException:
            self._loading = False
            raise

    def commit(self, version: int) -> None:
        """Ends a weight sync: all tensors came, and later samples carry `version`.

        Raises:
            ShapeMismatch: tensors are missing.
        """
        weights = self._idle("load weights")
        if not self._loading:
            raise OpdError("rollout: a weight sync ended that never began: no tensor came")
        self._loading = False
        weights.finish()
        self._version = version

    def begin(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Takes requests; `poll` works on them.

        Raises:
            OpdError: no weights were loaded, or earlier requests are under way.
            UserError: a request or the sampling cannot be served.
        """
        weights = self._idle("generate")
        if self._version is None:
            raise OpdError("rollout: the engine has no complete weights: load must succeed before generate")
        if not requests:
            return
        stop = frozenset(self._spec.eos_token_ids) | frozenset(sampling.stop_token_ids)
        _check(requests, sampling, stop, weights.shape)
        slots = self._room(requests, sampling, weights.shape)
        self._work = Generation(
            weights=weights,
            version=self._version,
            slots=slots,
            requests=requests,
            sampling=sampling,
            stop_token_ids=stop,
            prefill_tokens=self._spec.rollout.prefill_tokens,
            decode_texts=self._spec.decode,
            steps=None if self._device.type == "cpu" else self._steps_on(weights, slots, sampling),
        ).run()

    def poll(self, seconds: float) -> Progress:
        """Decodes for about `seconds` (at least one step) and returns what finished meanwhile.

        Raises:
            TrainingDiverged: the weights give logits that are not finite.
        """
        work, samples, deadline = self._work, [], time.monotonic() + seconds
        if work is None:
            return Progress([], done=True)
        try:
            for finished in work:
                samples += finished
                if time.monotonic() >= deadline:
                    return Progress(samples, done=False)
        except BaseException:
            self.cancel()
            raise
        self._work = None
        return Progress(samples, done=True)

    def cancel(self) -> None:
        """Forgets the requests under way, and a weight sync that did not end, if there are any."""
        self._loading = False
        if self._work is not None:
            # Their state may hold NaN, which a mask would not keep from spreading.
            self._work = self._slots = None
            self._steps.clear()

    def close(self) -> None:
        """Releases everything. Safe to call twice."""
        self._work = self._slots = self._weights = self._version = None
        self._steps.clear()

    def _idle(self, what: str) -> DecoderWeights:
        if self._weights is None:
            raise OpdError(f"rollout: the engine cannot {what}: it is not started, or is closed")
        if self._work is not None:
            raise OpdError(
                f"rollout: the engine cannot {what} while it generates: exhaust or close the earlier iterator first"
            )
        return self._weights

    def _room(self, requests: Sequence[Request], sampling: Sampling, shape: DecoderShape) -> Slots:
        """The state to decode in: the last one where its size fits, otherwise a new one."""
        prompt, response = max(len(request.prompt.tokens) for request in requests), sampling.max_response_tokens
        rollout, candidates = self._spec.rollout, sampling.log_prob_top_k
        unit = bytes_per_slot(shape, self._spec.dtype, candidates)
        rows = min(rollout.batch_size, len(requests))
        affordable = rollout.kv_cache_bytes // (unit * slots_needed(prompt, response, waiting=True))
        if affordable == 0:
            raise UserError(
                f"rollout.kv_cache_bytes={rollout.kv_cache_bytes}: a prompt of {prompt} tokens and a response of "
                f"{response} need {unit * slots_needed(prompt, response, waiting=True)} bytes. Raise it, or lower "
                "rollout.max_response_tokens"
            )
        rows = min(rows, affordable)
        length = slots_needed(prompt, response, waiting=rows < len(requests))
        slots, self._slots = self._slots, None
        if slots is None or not slots.fits(rows, length, response, candidates):
            self._steps.clear()
            slots = Slots(
                shape,
                rows=rows,
                length=length,
                response=response,
                candidates=candidates,
                dtype=self._spec.dtype,
                device=self._device,
            )
        slots.clear()
        self._slots = slots
        return slots

    def _steps_on(self, weights: DecoderWeights, slots: Slots, sampling: Sampling) -> StaticSteps:
        """How a GPU decodes in `slots`; what was captured for one call serves the next."""
        if sampling not in self._steps:
            # Experts are chosen by the host.
            graphs = self._spec.rollout.cuda_graphs and weights.shape.experts is None
            self._steps[sampling] = StaticSteps(weights, slots, sampling, graphs=graphs)
        return self._steps[sampling]


def _check(requests: Sequence[Request], sampling: Sampling, stop: frozenset[int], shape: DecoderShape) -> None:
    if sampling.max_response_tokens < 1:
        raise UserError("rollout.max_response_tokens=0: a response has at least one token. Set 1 or more")
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
        raise UserError(
            f"rollout: temperature {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k} describe no "
            "distribution. Use temperature >= 0 (0 is greedy), 0 < top_p <= 1 and top_k >= 0 (0 is all)"
        )
    if not 0 <= sampling.log_prob_top_k <= shape.vocab_size:
        raise UserError(
            f"opd.log_prob_top_k={sampling.log_prob_top_k}: the vocabulary has {shape.vocab_size} tokens. Use 0 (none) "
            "or at most that many"
        )
    unknown = sorted(token for token in stop if not 0 <= token < shape.vocab_size)
    if unknown:
        raise UserError(
            f"rollout.stop_token_ids: {unknown} are not in the model's vocabulary of {shape.vocab_size}. Leave them out"
        )
    for request in requests:
        prompt = request.prompt
        if len(prompt.tokens) == 0:
            raise UserError(f"prompt {prompt.id} has no tokens: there is nothing to continue. Drop it from the data")
        if len(prompt.tokens) + sampling.max_response_tokens > shape.max_length:
            raise UserError(
                f"prompt {prompt.id} has {len(prompt.tokens)} tokens: with rollout.max_response_tokens="
                f"{sampling.max_response_tokens} it exceeds the model's context of {shape.max_length}. Lower "
                "rollout.max_response_tokens or rollout.max_prompt_tokens"
            )
        if int(prompt.tokens.min()) < 0 or int(prompt.tokens.max()) >= shape.vocab_size:
            raise UserError(
                f"prompt {prompt.id} has token ids beyond the model's vocabulary of {shape.vocab_size}: it was "
                "tokenised for another model. Use the model's tokenizer"
            )
