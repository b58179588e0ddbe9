"""A run that is asked to stop saves at its next step boundary.

Queues send SIGUSR2 some time before they take the nodes away (`sbatch --signal`).
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

ASKS_TO_STOP = signal.SIGUSR2


@contextlib.contextmanager
def interruptible(grace_s: float | None) -> Iterator[Callable[[], bool]]:
    """Inside, ASKS_TO_STOP only makes a note; yields whether it has come.

    Args:
        grace_s: how long after the signal whoever handled it before gets it all the same, seconds: a step may last
            longer than there is time. None leaves it at the note.
    """
    if threading.current_thread() is not threading.main_thread():
        # Python lets only the main thread have handlers; elsewhere nobody sends us signals either.
        yield lambda: False
        return
    asked = threading.Event()
    timers: list[threading.Timer] = []
    before = signal.getsignal(ASKS_TO_STOP)

    def note(number: int, frame: FrameType | None) -> None:
        if asked.is_set() and callable(before):
            before(number, frame)
        elif not asked.is_set():
            asked.set()
            if grace_s is not None:
                timers.append(threading.Timer(grace_s, os.kill, (os.getpid(), ASKS_TO_STOP)))
                timers[-1].daemon = True
                timers[-1].start()

    signal.signal(ASKS_TO_STOP, note)
    try:
        yield asked.is_set
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(ASKS_TO_STOP, before)
