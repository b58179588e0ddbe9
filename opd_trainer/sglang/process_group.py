"""A torch process group beside the default one, formed with SGLang servers; rank 0 is the sender of weights."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def join(backend: str, address: str, port: int, *, rank: int, size: int, name: str, timeout_s: float) -> Any:
    """Blocks until all `size` processes have joined.

    SGLang joins with `init_custom_process_group` (a store of its own, prefixed with the name); rank 0 has to form its
    side in the same way, for which torch has no public function.
    """
    from torch.distributed import distributed_c10d

    # Parts of torch that are there, but not declared.
    c10d: Any = distributed_c10d
    stores: Any = dist
    timeout = timedelta(seconds=timeout_s)
    store = stores.TCPStore(address, port, size, is_master=rank == 0, timeout=timeout)
    prefixed = stores.PrefixStore(name, store)
    group, _ = c10d._new_process_group_helper(
        size, rank, [], c10d.Backend(backend), prefixed, group_name=name, timeout=timeout
    )
    c10d._world.pg_group_ranks[group] = {number: number for number in range(size)}
    return group


def broadcast(group: Any, tensors: Sequence[Tensor]) -> None:
    """Sends (rank 0) or receives `tensors`, one after the other."""
    works = [dist.broadcast(tensor, src=0, group=group, async_op=True) for tensor in tensors]
    for work in works:
        if work is not None:
            work.wait()


def leave(group: Any) -> None:
    """Ends our part of the group."""
    dist.destroy_process_group(group)


def dtype_name(dtype: torch.dtype) -> str:
    """float32 of torch.float32."""
    return str(dtype).removeprefix("torch.")
