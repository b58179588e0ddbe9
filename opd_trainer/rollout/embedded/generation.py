"""The decode core: a synchronous generator of finished samples, shared by every embedded engine.

Requests are sorted by length and decoded `rows` at once. Siblings share the prefill of their prompt. Finished rows run
on unheard until enough of them have gathered; then the batch is packed again and free rows take waiting requests. On a
GPU several steps go by before anybody looks which rows have finished: looking means waiting for the device.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from opd_trainer.errors import TrainingDiverged
from opd_trainer.rollout.embedded import decoder
from opd_trainer.rollout.embedded.sampling import draw, uniforms
from opd_trainer.rollout.embedded.slots import Slots
from opd_trainer.rollout.embedded.steps import StaticSteps, fused_attention
from opd_trainer.rollout.embedded.weights import DecoderWeights
from opd_trainer.types import Finish, Request, Sample, Sampling, TopK

_REFILL = 0.25
"""Free part of the batch at which waiting requests are let in."""
_SHRINK = 0.25
"""Finished part of the batch at which it is packed when nothing waits."""
_UNSEEN_STEPS = 8
"""Steps on a GPU between two looks at what was drawn."""
_SLACK_TOKENS = 128
"""Slots beyond the longest row, so that rows let in late rarely force the batch to be moved."""


def slots_needed(prompt: int, response: int, waiting: bool) -> int:
    """Slots of each row for prompts and responses up to these lengths; `waiting`: requests wait for a free row."""
    return prompt + response + (min(response, _SLACK_TOKENS) if waiting else 0)


@dataclass(slots=True)
class _Row:
    """A request on its way.

    Attributes:
        request: what was asked.
        key: of its prompt.
        born: the clock's reading before its first token.
        finish: set by its last token.
        drawn: tokens up to its last.
        beyond: slots behind its last token when that was seen.
    """

    request: Request
    key: bytes
    born: int = 0
    finish: Finish | None = None
    drawn: int = 0
    beyond: int = 0

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt.tokens)


def _rows(requests: Sequence[Request]) -> list[_Row]:
    """Requests in reverse order of service: the longest prompts last, siblings side by side."""
    rows = [_Row(request, request.prompt.tokens.numpy().tobytes()) for request in requests]
    first: dict[bytes, int] = {}
    for position, row in enumerate(rows):
        first.setdefault(row.key, position)
    return sorted(rows, key=lambda row: (row.prompt_length, -first[row.key]))


class Generation:
    """One call of `generate`.

    Args:
        weights: the model, complete.
        version: of the weights; put on every sample.
        slots: the state to decode in; large enough for every request (see `slots_needed`).
        requests: what to answer.
        sampling: how to draw.
        stop_token_ids: tokens that end a response.
        prefill_tokens: most prompt tokens, padding included, in one forward pass.
        decode_texts: turns lists of token ids into texts.
        steps: how a GPU decodes; None on a CPU.
    """

    def __init__(
        self,
        *,
        weights: DecoderWeights,
        version: int,
        slots: Slots,
        requests: Sequence[Request],
        sampling: Sampling,
        stop_token_ids: frozenset[int],
        prefill_tokens: int,
        decode_texts: Callable[[list[list[int]]], list[str]],
        steps: StaticSteps | None = None,
    ) -> None:
        self._weights, self._version, self._slots, self._sampling = weights, version, slots, sampling
        self._prefill_tokens, self._decode_texts, self._steps = prefill_tokens, decode_texts, steps
        self._capacity = len(slots.tokens)
        device = slots.tokens.device
        self._rotations = decoder.rotations(weights.shape, slots.length, device)
        self._stop = torch.zeros(weights.shape.vocab_size, dtype=torch.int64, device=device)
        self._stop[sorted(stop_token_ids)] = 1
        self._clock = 0
        self._num_alive = 0
        self._rows: list[_Row] = []
        self._waiting = _rows(requests)

    def run(self) -> Iterator[list[Sample]]:
        """Yields after every step the samples that it finished, often none.

        Raises:
            TrainingDiverged: the weights give logits that are not finite.
        """
        while self._waiting or self._num_alive:
            with torch.inference_mode(), fused_attention(self._slots.tokens.device):
                if self._must_pack():
                    finished = self._settle(self._pack(), 1)
                else:
                    finished = self._settle(slice(0, self._slots.count), self._decode())
            # Outside: what leaves must be usable under autograd, which tensors made in inference mode are not.
            yield self._samples(finished) if finished else []

    def _must_pack(self) -> bool:
        if self._num_alive == 0 or self._slots.end + 1 >= self._slots.length:
            return True
        if self._waiting:
            return self._capacity - self._num_alive >= _REFILL * self._capacity
        return len(self._rows) - self._num_alive >= _SHRINK * len(self._rows)

    def _decode(self) -> int:
        """Decodes some tokens of each row, and returns how many."""
        slots = self._slots
        if self._steps is None:
            rows = slice(0, slots.count)
            rotation = self._rotations[slots.position]
            hidden = decoder.forward(self._weights, slots.tokens[rows, slots.end], rotation, slots.attend)
            slots.end += 1
            self._draw(rows, decoder.logits(self._weights, hidden))
            count = 1
        else:
            wanted = self._sampling.max_response_tokens - min(
                self._drawn(row) for row in self._rows if row.finish is None
            )
            count = min(_UNSEEN_STEPS, wanted, slots.length - 1 - slots.end)
            self._steps.run(count)
        self._clock += count
        return count

    def _draw(self, rows: slice, logits: Tensor) -> None:
        self._slots.record(rows, draw(logits, self._sampling, self._slots.next_uniforms(rows)))

    def _drawn(self, row: _Row) -> int:
        return self._clock - row.born

    def _settle(self, rows: slice, count: int) -> list[int]:
        """Finishes the rows whose last token is among their `count` newest; the one transfer from the device."""
        window, longest = slice(self._slots.end + 1 - count, self._slots.end + 1), self._sampling.max_response_tokens
        stopped = self._stop[self._slots.tokens[rows, window]]
        codes = torch.where(self._slots.log_probs[rows, window].isfinite(), stopped, -1).tolist()
        finished: list[int] = []
        for index, newest in enumerate(codes, rows.start):
            row = self._rows[index]
            if row.finish is not None:
                continue
            before = self._drawn(row) - count
            last = next((place for place, code in enumerate(newest) if code or before + place + 1 == longest), None)
            if last is None:
                continue
            row.drawn, row.beyond, code = before + last + 1, count - 1 - last, newest[last]
            if code < 0:
                raise TrainingDiverged(
                    f"rollout: the student's weights of version {self._version} give logits that are not finite "
                    f"(prompt {row.request.prompt.id}, response token {row.drawn - 1}): nothing can be sampled"
                )
            row.finish = Finish.stop if code else Finish.length
            finished.append(index)
        self._num_alive -= len(finished)
        return finished

    def _samples(self, indices: list[int]) -> list[Sample]:
        slots, rows = self._slots, [self._rows[index] for index in indices]
        window = slice(slots.end + 1 - max(row.drawn + row.beyond for row in rows), slots.end + 1)
        chosen = torch.tensor(indices, device=slots.tokens.device)

        def responses(record: Tensor) -> list[Tensor]:
            lines = record[:, window].index_select(0, chosen).cpu()
            ends = (len(line) - row.beyond for line, row in zip(lines, rows, strict=True))
            return [line[end - row.drawn : end].clone() for line, row, end in zip(lines, rows, ends, strict=True)]

        tokens, log_probs = responses(slots.tokens), responses(slots.log_probs)
        topk: list[TopK | None] = [None] * len(rows)
        if self._sampling.log_prob_top_k:
            pairs = zip(responses(slots.topk_ids), responses(slots.topk_log_probs), strict=True)
            topk = [TopK(ids=ids, log_probs=log_probs) for ids, log_probs in pairs]
        texts = self._decode_texts([response.tolist() for response in tokens])
        return [
            Sample(
                prompt=row.request.prompt,
                index=row.request.index,
                response=tokens[i],
                log_probs=log_probs[i],
                finish=row.finish or Finish.abort,
                version=self._version,
                text=texts[i],
                topk=topk[i],
            )
            for i, row in enumerate(rows)
        ]

    def _pack(self) -> slice:
        """Drops finished rows and lets waiting requests in; the rows returned have just drawn their first token."""
        slots = self._slots
        alive = [index for index, row in enumerate(self._rows) if row.finish is None]
        self._rows = [self._rows[index] for index in alive]
        entering = [self._waiting.pop() for _ in range(min(self._capacity - len(alive), len(self._waiting)))]
        # A row has its prompt and every drawn token but the newest in the cache.
        used = max((row.prompt_length + self._drawn(row) - 1 for row in self._rows), default=0)
        slots.keep(alive, used, max([used, *(row.prompt_length for row in entering)]))
        for chunk in self._chunks(entering):
            self._prefill(chunk)
        self._num_alive += len(entering)
        return slice(len(alive), slots.count)

    def _chunks(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Cuts rows (longest prompt first, siblings side by side) so that each prefill stays within its token limit."""
        chunk: list[_Row] = []
        prompts = 0
        for row in rows:
            same = bool(chunk) and chunk[-1].key == row.key
            if chunk and not same and (prompts + 1) * chunk[0].prompt_length > self._prefill_tokens:
                yield chunk
                chunk, prompts = [], 0
            chunk.append(row)
            prompts += not same
        if chunk:
            yield chunk

    def _prefill(self, entering: list[_Row]) -> None:
        """Runs the prompts of `entering`, each once, copies their keys and values to every sibling and draws."""
        slots, device = self._slots, self._slots.tokens.device
        prompts = {row.key: row.request.prompt.tokens for row in entering}
        number = {key: i for i, key in enumerate(prompts)}
        owner = torch.tensor([number[row.key] for row in entering], device=device)
        rows = slots.add(
            torch.tensor([row.prompt_length for row in entering]),
            uniforms([row.request.seed for row in entering], self._sampling.max_response_tokens),
        )
        for row in entering:
            row.born = self._clock - 1
        self._rows.extend(entering)
        lengths = torch.tensor([len(tokens) for tokens in prompts.values()], device=device)
        width = entering[0].prompt_length
        padded = [F.pad(tokens, (width - len(tokens), 0)) for tokens in prompts.values()]
        rotation, mask = self._prompt_geometry(width - lengths.unsqueeze(1), width)
        target = slice(slots.end - width, slots.end)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (x.unflatten(0, (-1, width)).transpose(1, 2) for x in (query, key, value))
            slots.keys[layer][rows, :, target] = key.index_select(0, owner)
            slots.values[layer][rows, :, target] = value.index_select(0, owner)
            repeat = query.shape[1] // key.shape[1] if query.is_cuda else 1
            if repeat > 1:
                # torch's fused attention for GPUs takes a mask, or key heads that are shared, but not both.
                key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
            return mixed.transpose(1, 2).flatten(2).flatten(0, 1)

        hidden = decoder.forward(self._weights, torch.cat(padded).to(device), rotation, attend)
        last = hidden.unflatten(0, (-1, width))[:, -1]
        self._draw(rows, decoder.logits(self._weights, last).index_select(0, owner))

    def _prompt_geometry(self, start: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Rotations [U * width, D / 2] and mask [U, 1, width, width] of prompts padded up to `start` [U, 1]."""
        column = torch.arange(width, device=start.device)
        mask = (column <= column[:, None]) & (column >= start[:, :, None])
        # Padding sees itself: a query without any key would be NaN, and spread.
        mask |= column == column[:, None]
        return self._rotations[(column - start).clamp_(min=0).flatten()], mask.unsqueeze(1)
