"""What runs in every task of a SLURM job."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from opd_trainer import app
from opd_trainer.build.placement import server_devices
from opd_trainer.cluster.config import SlurmCluster
from opd_trainer.cluster.nodes import head, member, this_task
from opd_trainer.config import Config
from opd_trainer.errors import Interrupted, WorkerDied
from opd_trainer.interruption import ASKS_TO_STOP

END_S = 10.0
"""How long a cancelled task may take to end in order."""


@dataclass(frozen=True, slots=True)
class RunInJob:
    """A run as submitit pickles it when it is submitted: nothing of it is looked up again later.

    Attributes:
        config: of the run, with a `SlurmCluster`.
        directory: of the run, absolute.
    """

    config: Config
    directory: Path

    def __call__(self) -> float | None:
        """Rank 0 runs the controller, the others bring their node's workers."""
        cluster = self.config.cluster
        assert isinstance(cluster, SlurmCluster), "checked with the configuration"
        task = this_task()
        with cancellable():
            if task.rank > 0:
                member(task, self.directory / "slurm", cluster.start_timeout_s)
                return None
            served = {device for devices in server_devices(self.config).values() for device in devices}
            try:
                with head(task, self.directory / "slurm", cluster.start_timeout_s, served) as address:
                    print(f"Ray at {address} for {task.nodes} nodes, attempt {task.attempt}", flush=True)
                    return app.run(self.config, self.directory)
            except Interrupted as interrupted:
                print(interrupted, flush=True)
                go_back_into_the_queue()
                raise
            except WorkerDied as error:
                if int(task.attempt.rpartition(".")[2]) >= cluster.max_restarts:
                    raise
                print(f"{error}\nThe job goes back into the queue, to continue elsewhere.", flush=True)
                go_back_into_the_queue()
                raise

    def checkpoint(self) -> Any:
        """What submitit runs when the job comes back: the same, which resumes from its newest checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def go_back_into_the_queue() -> None:
    """Lets submitit, which handles the signal, requeue the job; does not return where it does."""
    os.kill(os.getpid(), ASKS_TO_STOP)


@contextlib.contextmanager
def cancellable() -> Iterator[None]:
    """SIGTERM ends the task in order, inside: submitit would ignore it until SLURM kills the task."""

    def end(number: int, frame: FrameType | None) -> None:
        # Once is enough: what ends in order must not be disturbed at it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("cancelled: SLURM asked the task to end", flush=True)
        # SLURM has signalled Ray as well, which may not answer any more.
        late = threading.Timer(END_S, os._exit, (128 + number,))
        late.daemon = True
        late.start()
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
