"""Decoding steps whose shapes and addresses stay the same while the batch grows, so that a GPU can replay them.

A step launches hundreds of small kernels, and a GPU is done with them sooner than Python can ask for the next. As a
CUDA graph they are one launch; in return nothing in a step may depend on a number that only Python knows: how far the
batch is comes from a tensor on the device, and attention reads a width that is rounded up, behind a mask.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from opd_trainer.rollout.embedded import decoder
from opd_trainer.rollout.embedded.sampling import draw
from opd_trainer.rollout.embedded.slots import Slots
from opd_trainer.rollout.embedded.weights import DecoderWeights
from opd_trainer.types import Sampling

_WIDTH = 128
"""Slots by which the width that attention reads grows."""
_ROWS = 8
"""Rows are rounded up to a multiple of an eighth of the next power of two, and of this."""


def fused_attention(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """On a GPU: no attention of cuDNN's inside, which is planned anew for each length."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class StaticSteps:
    """Steps of one set of slots under one sampling.

    Args:
        weights: the model; its tensors stay where they are when new weights come.
        slots: the state.
        sampling: how to draw.
        graphs: capture the steps of each size as a CUDA graph; the device must be a GPU.
    """

    def __init__(self, weights: DecoderWeights, slots: Slots, sampling: Sampling, *, graphs: bool) -> None:
        self._weights, self._slots, self._sampling = weights, slots, sampling
        device = slots.tokens.device
        self._rotations = decoder.rotations(weights.shape, slots.length, device)
        self._end = torch.zeros(1, dtype=torch.int64, device=device)
        self._slot = torch.arange(slots.length, device=device)
        self._stream = torch.cuda.Stream(device) if graphs else None
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}

    def run(self, count: int) -> None:
        """Decodes the next `count` tokens of all rows, without waiting for the device."""
        slots = self._slots
        width = -(-(slots.end + count) // _WIDTH) * _WIDTH
        size = rounded_rows(slots.count, len(slots.tokens)), min(width, slots.length)
        self._end.fill_(slots.end)
        for _ in range(count):
            graph = None if self._stream is None else self._graph(size, self._stream)
            if graph is None:
                self.step(*size)
            else:
                graph.replay()
        slots.end += count

    def _graph(self, size: tuple[int, int], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
        """The step of a size; None the first time, when it runs as it is, which loads its kernels."""
        if size not in self._graphs:
            self._graphs[size] = None
        elif self._graphs[size] is None:
            graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(stream.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                # Training may go on in another thread.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                self.step(*size)
                graph.capture_end()
            current.wait_stream(stream)
            self._graphs[size] = graph
        return self._graphs[size]

    def step(self, rows: int, width: int) -> None:
        """One token of each of the first `rows` rows, from the first `width` slots.

        Rows behind the last real one compute what nobody reads.
        """
        slots, end, slot = self._slots, self._end, self._slot[:width]
        start = slots.start[:rows]
        # Every row sees its newest slot, whatever was left in it: softmax over nothing would be NaN, and spread.
        unseen = ((slot < start) | (slot > end)) & (slot != end)
        bias = torch.zeros_like(unseen, dtype=slots.keys[0].dtype).masked_fill_(unseen, -torch.inf)[:, None, None]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = slots.keys[layer][:rows], slots.values[layer][:rows]
            keys.index_copy_(2, end, key.unsqueeze(2))
            values.index_copy_(2, end, value.unsqueeze(2))
            # The query heads that share a key head are the rows of one product, so that keys are never repeated.
            heads = query.unflatten(1, (keys.shape[1], -1))
            mixed = F.scaled_dot_product_attention(heads, keys[:, :, :width], values[:, :, :width], attn_mask=bias)
            return mixed.reshape(rows, -1)

        tokens = slots.tokens[:rows].index_select(1, end).squeeze(1)
        rotation = self._rotations.index_select(0, (end - start.squeeze(1)).clamp_(min=0))
        hidden = decoder.forward(self._weights, tokens, rotation, attend)
        drawn = draw(decoder.logits(self._weights, hidden), self._sampling, slots.next_uniforms(slice(0, rows)))
        end += 1
        for record, newest in slots.records(drawn):
            record[:rows].index_copy_(1, end, newest.unsqueeze(1))


def rounded_rows(count: int, most: int) -> int:
    """How many of `most` rows to compute for the first `count`, so that few sizes occur."""
    unit = max(_ROWS, (1 << (count - 1).bit_length()) // 8)
    return min(-(-count // unit) * unit, most)
