"""One save of a torch_dist checkpoint: copy the state, write it (in a thread, if asked), and only then complete it.

Planning and completing are collective and happen in the caller's thread; the thread in between only writes files.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

from opd_trainer.files import unwritable
from opd_trainer.megatron.compat import cpu_tensors, inline_checkpoint_writer

FORMAT = "torch_dist"


class Saving:
    """A save under way. Without `finish` the directory holds no checkpoint."""

    def __init__(self, directory: Path, thread: Thread | None, complete: list[Callable[[], None]]) -> None:
        """See `begin`; `thread` writes, where not everything is written."""
        self._directory, self._thread, self._complete = directory, thread, complete

    @property
    def done(self) -> bool:
        """Whether everything of this rank is written, or has failed."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Until `done`."""
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> None:
        """Waits and completes the checkpoint; collective.

        Raises:
            CheckpointError: a rank could not write.
        """
        self.wait()
        with writing(self._directory):
            for complete in self._complete:
                complete()


def begin(directory: Path, state: dict[str, Any], *, background: bool) -> Saving:
    """Begins to save a sharded state; collective.

    Args:
        directory: exists and holds no checkpoint.
        state: what to save.
        background: copy the state to the host first, so that it may change while it is written, which this does not
            wait for. Otherwise it is written on return.

    Raises:
        CheckpointError: this rank cannot write.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    strategy = TorchDistSaveShardedStrategy(FORMAT, 1, thread_count=1)
    with writing(directory), inline_checkpoint_writer():
        request: Any = dist_checkpointing.save(state, str(directory), strategy, async_sharded_save=True)
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            arguments[1] = _copied(request.preload_fn(), arguments[1]) if background else request.preload_fn()
    # A rank may have nothing to write.
    write = request.async_fn or (lambda *_: None)
    if not background:
        write(*arguments)
        return Saving(directory, None, request.finalize_fns)
    thread = Thread(target=write, args=arguments, name=f"save {directory.name}")
    thread.start()
    return Saving(directory, thread, request.finalize_fns)


def _copied(on_host: list[Any], original: list[Any]) -> list[Any]:
    """Megatron's plan of files, with copies of the tensors that were on the host already and may change there."""
    return [
        (
            file,
            key,
            (objects, [(item, host.clone() if live.is_cpu else host) for item, host, live in _pairs(ours, theirs)]),
        )
        for (file, key, (objects, ours)), (_, _, (_, theirs)) in zip(on_host, original, strict=True)
    ]


def _pairs(on_host: list[Any], original: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
    for (item, host), (_, live) in zip(on_host, original, strict=True):
        yield item, host, live


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Lets Megatron read or write files, without the warnings of torch that only Megatron's authors can act on."""
    with warnings.catch_warnings(), cpu_tensors():
        warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
        warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
        yield


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turns what Megatron and torch raise when they cannot write into a CheckpointError."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with quietly():
            yield
    except (CheckpointingException, CheckpointException, RuntimeError, OSError) as error:
        raise unwritable(directory, error) from error
