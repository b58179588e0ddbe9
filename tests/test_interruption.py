import os
import signal
import time
from collections.abc import Iterator

import pytest

from opd_trainer.interruption import ASKS_TO_STOP, interruptible


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """What reaches whoever handled the signal before."""
    found: list[int] = []
    before = signal.signal(ASKS_TO_STOP, lambda number, frame: found.append(number))
    yield found
    signal.signal(ASKS_TO_STOP, before)


def ask() -> None:
    os.kill(os.getpid(), ASKS_TO_STOP)


def test_a_signal_is_noted_and_kept_from_others(heard: list[int]) -> None:
    with interruptible(None) as asked:
        assert not asked()
        ask()
        assert asked()
    assert heard == []
    ask()
    assert heard == [ASKS_TO_STOP]


def test_who_waits_too_long_is_overtaken(heard: list[int]) -> None:
    with interruptible(0.1) as asked:
        ask()
        assert asked()
        deadline = time.monotonic() + 60
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
    assert heard == [ASKS_TO_STOP]


def test_who_is_done_in_time_is_not_disturbed(heard: list[int]) -> None:
    with interruptible(1.0):
        ask()
    time.sleep(1.5)
    assert heard == []
