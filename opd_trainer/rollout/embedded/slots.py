"""The preallocated state of the rows being decoded: KV cache, tokens and randomness.

Every row ends at the same slot (`end`), so that a decoding step writes one plain slice for all rows, whatever their
lengths; a row's first slot is `start`. Slots before it are masked, and always finite.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opd_trainer.rollout.embedded.sampling import Drawn
from opd_trainer.rollout.embedded.shape import DecoderShape

_TOKEN_BYTES = 12
"""A token id and its log-prob."""


def bytes_per_slot(shape: DecoderShape, dtype: torch.dtype, candidates: int) -> int:
    """Bytes of one slot of one row: keys, values, and the token with its candidates."""
    cache = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize
    return cache + _TOKEN_BYTES * (1 + candidates)


class Slots:
    """Rows [0, `count`) of a batch, aligned at their ends.

    Args:
        shape: sizes of the model.
        rows: most rows at once.
        length: slots of each row.
        response: longest response, tokens.
        candidates: likeliest tokens to keep at each position.
        dtype: number format of keys and values.
        device: where they live.
    """

    def __init__(
        self,
        shape: DecoderShape,
        *,
        rows: int,
        length: int,
        response: int,
        candidates: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        size = (rows, shape.num_kv_heads, length, shape.head_dim)
        self._shape = shape
        self.length = length
        self.count = 0
        self.end = 0
        # Zeros, not garbage: a masked NaN would still poison a weighted sum (0 * NaN).
        self.keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.num_layers)]
        self.values = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.num_layers)]
        self.tokens = torch.zeros((rows, length), dtype=torch.int64, device=device)
        self.log_probs = torch.zeros((rows, length), dtype=torch.float32, device=device)
        self.topk_ids = torch.zeros((rows, length, candidates), dtype=torch.int64, device=device)
        self.topk_log_probs = torch.zeros((rows, length, candidates), dtype=torch.float32, device=device)
        self.uniforms = torch.zeros((rows, response), dtype=torch.float64, device=device)
        self.drawn = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.start = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self._bias = torch.zeros((rows, shape.num_kv_heads, 1, length), dtype=dtype, device=device)
        self._slot = torch.arange(length, device=device)

    def fits(self, rows: int, length: int, response: int, candidates: int) -> bool:
        """Whether this state serves a batch of these sizes."""
        own = (len(self.tokens), self.uniforms.shape[1], self.topk_ids.shape[2])
        return own == (rows, response, candidates) and self.length >= length

    def clear(self) -> None:
        """Drops all rows."""
        self.count = self.end = 0

    @property
    def position(self) -> Tensor:
        """i64[rows]: the position of slot `end` in each row."""
        return self.end - self.start[: self.count, 0]

    def keep(self, rows: Sequence[int], used: int, end: int) -> None:
        """Keeps only `rows`, packed to the front, with their last `used` slots now ending at `end`.

        The token at the old `end` slot, drawn but not yet processed, moves along.
        """
        if self._unmoved(rows, end):
            return
        count, index = len(rows), torch.tensor(rows, dtype=torch.int64, device=self.start.device)
        source, target = slice(self.end - used, self.end), slice(end - used, end)
        for cache in (*self.keys, *self.values):
            cache[:count, :, target] = cache[:, :, source].index_select(0, index)
        for record in (self.tokens, self.log_probs, self.topk_ids, self.topk_log_probs):
            record[:count, end - used : end + 1] = record[:, self.end - used : self.end + 1].index_select(0, index)
        for state in (self.uniforms, self.drawn):
            state[:count] = state.index_select(0, index)
        self.start[:count] = self.start.index_select(0, index) + (end - self.end)
        self.count, self.end = count, end
        self._mask(0)

    def add(self, lengths: Tensor, uniforms: Tensor) -> slice:
        """Appends rows whose prompts, of these `lengths` i64[n], will end at `end`; returns where they are."""
        rows = slice(self.count, self.count + len(lengths))
        self.start[rows] = (self.end - lengths.to(self.start.device)).unsqueeze(-1)
        self.uniforms[rows] = uniforms.to(self.uniforms.device)
        self.drawn[rows] = 0
        self.count = rows.stop
        self._mask(rows.start)
        return rows

    def next_uniforms(self, rows: slice) -> Tensor:
        """f64[n]: each row's next uniform, which is used up by this."""
        drawn = self.drawn[rows]
        # A finished row runs on, unheard, until the batch is packed again.
        uniform = self.uniforms[rows].gather(1, drawn.clamp(max=self.uniforms.shape[1] - 1))
        drawn += 1
        return uniform.squeeze(1)

    def record(self, rows: slice, drawn: Drawn) -> None:
        """Puts drawn tokens into slot `end`."""
        for record, newest in self.records(drawn):
            record[rows, self.end] = newest

    def records(self, drawn: Drawn) -> Iterator[tuple[Tensor, Tensor]]:
        """What is kept of every slot [rows, `length`, ...], each with what is new [n, ...]."""
        yield self.tokens, drawn.tokens
        yield self.log_probs, drawn.log_probs
        if self.topk_ids.shape[2]:
            yield self.topk_ids, drawn.topk_ids
            yield self.topk_log_probs, drawn.topk_log_probs

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one new token of each row, at slot `end`, to its whole row, on a CPU; see `decoder.Attend`."""
        count, used = self.count, self.end + 1
        keys, values, bias = self.keys[layer][:count], self.values[layer][:count], self._bias[:count, :, :, :used]
        keys[:, :, self.end], values[:, :, self.end] = key, value
        keys, values = keys[:, :, :used], values[:, :, :used]
        # The query heads that share a key head are the rows of one product, so that keys are never repeated.
        heads = query.unflatten(1, (self._shape.num_kv_heads, -1))
        # torch's CPU attention is built for many queries: for one it is 10x slower than two products (measured).
        scores = torch.matmul(heads, keys.transpose(-1, -2))
        scores = torch.add(bias, scores, alpha=1.0 / math.sqrt(self._shape.head_dim))
        return torch.matmul(scores.softmax(-1), values).view(count, -1)

    def _unmoved(self, rows: Sequence[int], end: int) -> bool:
        if list(rows) != list(range(len(rows))) or (rows and end != self.end):
            return False
        self.count, self.end = len(rows), end
        return True

    def _mask(self, first: int) -> None:
        rows = slice(first, self.count)
        masked = self._slot < self.start[rows]
        self._bias[rows] = torch.zeros_like(masked, dtype=self._bias.dtype).masked_fill_(masked, -math.inf)[
            :, None, None
        ]
