"""A micro-batch on its way through a model, and forward-only log-probs.

T = tokens of the micro-batch, M = tokens whose log-prob is wanted: those with mask True. The output head runs on the M
positions before them only.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_trainer.megatron.attention import Packed
from opd_trainer.megatron.build import MegatronModel
from opd_trainer.megatron.log_probs import token_log_probs
from opd_trainer.types import Scores, TokenBatch


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A micro-batch on a worker's device.

    Attributes:
        batch: what the controller sent.
        packed: what a model takes; a single token that nobody asked for when the micro-batch is empty.
        index: i64[M], the tokens whose log-prob is wanted, in order.
    """

    batch: TokenBatch
    packed: Packed
    index: Tensor

    @property
    def targets(self) -> Tensor:
        """i64[M], their ids."""
        return self.batch.tokens[self.index]

    def scatter(self, values: Tensor) -> Tensor:
        """[M] -> [T], NaN on the other tokens; gradients flow through."""
        return self.unknown(values.dtype).index_copy(0, self.index, values)

    def unknown(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[T], NaN everywhere."""
        return torch.full((self.batch.num_tokens,), torch.nan, dtype=dtype, device=self.index.device)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How log-probs are computed from logits; the same for student, teachers and reference.

    Attributes:
        temperature: that logits are divided by.
        chunk_tokens: positions whose logits are in fp32 at a time.
    """

    temperature: float
    chunk_tokens: int

    def __call__(
        self, model: MegatronModel, logits: Tensor, targets: Tensor, *, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy f32[M] of `logits` [M, V / tensor-parallel ranks]."""
        return token_log_probs(
            logits,
            targets,
            temperature=self.temperature,
            vocab_size=model.architecture.vocab_size,
            chunk_tokens=self.chunk_tokens,
            tp_group=model.runtime.tp_group,
            entropy_gradient=entropy_gradient,
        )


def on_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """The batch with its tensors on `device`."""

    def moved(value: Any) -> Any:
        if isinstance(value, Scores):
            return dataclasses.replace(value, log_probs=value.log_probs.to(device))
        return value.to(device) if isinstance(value, Tensor) else value

    return batch.replace(**{field.name: moved(getattr(batch, field.name)) for field in dataclasses.fields(batch)})


def prepare(batch: TokenBatch, device: torch.device) -> MicroBatch:
    """Puts a micro-batch on the device and finds the positions that predict its response tokens."""
    batch = on_device(batch, device)
    lengths, positions = batch.lengths, batch.positions
    index = batch.mask.nonzero().squeeze(1)
    assert not bool((positions[index] == 0).any()), "a response token follows at least one prompt token"
    tokens = batch.tokens
    if not len(tokens):
        # Stages of a pipeline pass something on for every micro-batch, and no model computes zero tokens.
        tokens = positions = positions.new_zeros(1)
        lengths = lengths.new_ones(1)
    packed = Packed(
        tokens=tokens,
        position_ids=positions,
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32),
        max_length=int(lengths.max()),
        select=index - 1,
    )
    return MicroBatch(batch, packed, index)


def score(model: MegatronModel, micro_batch: MicroBatch, scoring: Scoring) -> Tensor:
    """Log-probs of a micro-batch without gradient; see `forward_only`."""
    return forward_only(model, micro_batch, lambda logits: scoring(model, logits, micro_batch.targets)[0])


def forward_only(model: MegatronModel, micro_batch: MicroBatch, read: Callable[[Tensor], Tensor]) -> Tensor:
    """What `read` makes of the model's output [M, ...], f32[M], in a forward pass over all pipeline stages.

    Returns:
        f32[T] without gradient, NaN where the mask is False; all NaN on pipeline stages before the last.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    if not len(micro_batch.index):
        return micro_batch.unknown()

    def forward_step(data: Iterator[Packed], _module: Any) -> tuple[Tensor, Any]:
        return model.forward(next(data)), finish

    def finish(output: Tensor, non_loss_data: bool) -> Tensor:
        assert non_loss_data, "nothing is trained here"
        return read(output)

    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([micro_batch.packed]),
            model=model.modules,
            num_microbatches=1,
            seq_length=micro_batch.batch.num_tokens,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return micro_batch.scatter(results[0]) if results else micro_batch.unknown()
