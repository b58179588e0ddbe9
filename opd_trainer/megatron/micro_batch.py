"""A micro-batch on its way through a model, and forward-only log-probs.

T = tokens of the micro-batch, M = tokens whose log-prob is wanted: those with mask True. The output head runs on the M
positions before them only; where context-parallel ranks share the tokens, on those of its own rank: m of them.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from opd_trainer.megatron.attention import Keys, Packed
from opd_trainer.megatron.build import MegatronModel
from opd_trainer.megatron.compat import has_gpu
from opd_trainer.megatron.context import collect, share, tokens_per_rank
from opd_trainer.megatron.families.base import Architecture
from opd_trainer.megatron.flop import forward_flop
from opd_trainer.megatron.log_probs import token_log_probs
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.types import Scores, TokenBatch

Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A micro-batch on a worker's device.

    Attributes:
        batch: what the controller sent.
        packed: what a model takes of it on this rank; never empty.
        index: i64[M], the tokens whose log-prob is wanted, in order.
        mine: i64[m], those of `index` that this rank's model output is about.
        context_group: the ranks that share the tokens; None when this rank has all of them.
        pairs: of a token and one that it attends to, over all ranks.
    """

    batch: TokenBatch
    packed: Packed
    index: Tensor
    mine: Tensor
    context_group: ProcessGroup | None
    pairs: int

    @property
    def own(self) -> Tensor:
        """i64[m], the tokens whose prediction this rank's model output is, ascending."""
        return self.index[self.mine]

    @property
    def targets(self) -> Tensor:
        """i64[m], their ids."""
        return self.batch.tokens[self.own]

    def forward_flop(self, architecture: Architecture) -> int:
        """Floating-point operations of a forward pass of all ranks; see `opd_trainer.megatron.flop`."""
        return forward_flop(architecture, self.batch.num_tokens, self.pairs, len(self.index))

    def scatter(self, values: Tensor) -> Tensor:
        """[m, ...] of each rank -> [T, ...] on every rank, NaN on the other tokens; gradients flow (see `collect`)."""
        if self.context_group is not None and len(self.index):
            values = collect(values, self.mine, len(self.index), self.context_group)
        return self.unknown(*values.shape[1:], dtype=values.dtype).index_copy(0, self.index, values)

    def unknown(self, *more: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[T, *more], NaN everywhere."""
        return torch.full((self.batch.num_tokens, *more), torch.nan, dtype=dtype, device=self.index.device)


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
        """Log-probs and entropy f32[m] of `logits` [m, V / tensor-parallel ranks]."""
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


def prepare(batch: TokenBatch, runtime: MegatronRuntime) -> MicroBatch:
    """Puts a micro-batch on the device and finds the positions that predict its response tokens.

    Collective over the ranks that share a replica of the model or its experts.
    """
    lengths = batch.lengths.cpu()
    wanted = batch.mask.nonzero().squeeze(1).cpu()
    ranks = runtime.cp_size
    part = share(lengths, runtime.cp_rank, ranks, _padded_size(tokens_per_rank(lengths, ranks), runtime))
    assert not bool((batch.positions.cpu()[wanted] == 0).any()), "a response token follows at least one prompt token"
    mine = part.mine[wanted - 1].nonzero().squeeze(1)
    batch = on_device(batch, runtime.device)
    tokens = part.tokens.to(runtime.device)

    def padded(values: Tensor) -> Tensor:
        return torch.cat([values[tokens], values.new_zeros(part.size - len(tokens))])

    keys = None
    if ranks > 1:
        most = int(part.cu_keys.diff().max())
        keys = Keys(runtime.cp_group, part.keys.to(runtime.device), part.cu_keys.to(runtime.device), most)
    packed = Packed(
        tokens=padded(batch.tokens),
        position_ids=padded(batch.positions),
        cu_seqlens=part.cu_seqlens.to(runtime.device),
        max_length=int(part.cu_seqlens.diff().max()),
        select=part.row[wanted[mine] - 1].to(runtime.device),
        keys=keys,
    )
    group = runtime.cp_group if ranks > 1 else None
    pairs = int((lengths * (lengths + 1) // 2).sum())
    return MicroBatch(batch, packed, wanted.to(runtime.device), mine.to(runtime.device), group, pairs)


def _padded_size(tokens: int, runtime: MegatronRuntime) -> int:
    """How many tokens every rank that takes part computes: at least one, because no model computes none."""
    multiple = runtime.tp_size if runtime.settings.sequence_parallel else 1
    size = -(-max(1, tokens) // multiple) * multiple
    if runtime.ep_size > 1 and not has_gpu():
        # Without a GPU experts gather the tokens of all ranks, and a gathering takes as many from each.
        most = torch.tensor(size)
        distributed.all_reduce(most, distributed.ReduceOp.MAX, group=runtime.ep_group)
        size = int(most)
    return size


def is_idle(model: MegatronModel, micro_batch: MicroBatch) -> bool:
    """Whether a model need not run: nothing is wanted, and no stage waits for activations, no expert for tokens."""
    runtime = model.runtime
    return not len(micro_batch.index) and runtime.pp_size == 1 and runtime.ep_size == 1


def score(model: MegatronModel, micro_batch: MicroBatch, scoring: Scoring) -> Tensor:
    """Log-probs f32[T] of a micro-batch without gradient, NaN where the mask is False; see `forward_only`."""
    found = forward_only(model, micro_batch, lambda logits: scoring(model, logits, micro_batch.targets)[0])
    return micro_batch.unknown() if found is None else micro_batch.scatter(found)


def forward_only(
    model: MegatronModel, micro_batch: MicroBatch, read: Callable[[Tensor], Read], *, head: bool = True
) -> Read | None:
    """What `read` makes of the model's output in a forward pass over all pipeline stages, without gradient.

    Args:
        model: any model.
        micro_batch: its tokens.
        read: takes [m, ...], of this rank's part of the tokens with mask True.
        head: whether the output head runs; otherwise `read` takes hidden states.

    Returns:
        None where nothing was to be computed, and on pipeline stages before the last.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    if is_idle(model, micro_batch):
        return None

    def forward_step(data: Iterator[Packed], _module: Any) -> tuple[Tensor, Any]:
        return model.forward(next(data), head=head), finish

    def finish(output: Tensor, non_loss_data: bool) -> Read:
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
    return results[0] if results else None
