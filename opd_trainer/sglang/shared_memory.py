"""Tensors handed to a server process on the same machine through shared memory, in the form that SGLang unpickles."""

import base64
import io
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor

_LOCK = threading.Lock()


def handles(named: Sequence[tuple[str, Tensor]]) -> str:
    """Base64 of the pickled handles of CPU tensors; can be opened once, so every reader needs handles of its own.

    The tensors' storage moves into shared memory: pass copies that nobody else writes to, and keep them until
    the reader has answered.
    """
    # Descriptors, torch's other way, can only be passed between processes that share an authentication key.
    with _LOCK, _file_system_sharing():
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(list(named))
    return base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def _file_system_sharing() -> Iterator[None]:
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        with _silent_descendants():
            yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


@contextmanager
def _silent_descendants() -> Iterator[None]:
    """Keeps torch_shm_manager, which torch starts here and which outlives us, from holding our output open.

    Seen with torch 2.13: a pipe behind the trainer never ends, because the daemon inherited its writing end.
    """
    saved = [(number, os.dup(number)) for number in (1, 2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in saved:
            os.dup2(null, number)
        yield
    finally:
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)
        os.close(null)
