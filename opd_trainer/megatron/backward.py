"""Megatron's schedule of forward and backward passes over the micro-batches of a data-parallel rank.

M = tokens of a micro-batch whose prediction is wanted.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_trainer.megatron.build import MegatronModel
from opd_trainer.megatron.micro_batch import MicroBatch, is_idle
from opd_trainer.types import TokenBatch

Share = Callable[[int, MicroBatch, Tensor | None], Tensor]
"""From a micro-batch's number, the micro-batch and the model's output [M, ...] (None where nothing was to be computed)
to its share of the loss, a scalar. Called on the last pipeline stage, once for each micro-batch."""


def forward_backward(
    model: MegatronModel,
    chunks: Sequence[Any],
    batches: Sequence[TokenBatch],
    prepared: Iterable[MicroBatch],
    share: Share,
) -> None:
    """Leaves the gradient of the sum of all shares, summed over all ranks, in the chunks' buffers.

    Args:
        model: what is trained.
        chunks: its modules, wrapped by `opd_trainer.megatron.optimizer.wrap`.
        batches: the same number on each rank.
        prepared: the same micro-batches on their device; taken one by one, except in a pipeline.
        share: see `Share`.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    pipelined = model.runtime.pp_size > 1

    def forward_step(data: Iterator[tuple[int, MicroBatch]], _chunk: Any) -> tuple[Tensor, Any]:
        number, micro_batch = next(data)
        skipped = is_idle(model, micro_batch)

        def finish(output: Tensor) -> tuple[Tensor, Tensor, None]:
            total = share(number, micro_batch, None if skipped else output)
            return total, torch.zeros((), dtype=torch.int, device=total.device), None

        if skipped:
            return torch.zeros((), device=micro_batch.index.device), finish
        return model.forward(micro_batch.packed), finish

    get_forward_backward_func()(
        forward_step_func=forward_step,
        # What prepares a micro-batch may run a schedule of its own, which cannot be inside of a pipeline's.
        data_iterator=iter(enumerate(list(prepared) if pipelined else prepared)),
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=max(batch.num_tokens for batch in batches),
        micro_batch_size=1,
        forward_only=False,
    )
