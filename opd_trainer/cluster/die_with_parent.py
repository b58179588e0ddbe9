"""Runs a command in a process group that ends with it, and with whoever asked for it: `die_with_parent.py PID COMMAND`.

SGLang's scheduler and detokenizer are processes of their own: killed alone, while it starts above all, a server leaves
them behind, with its memory and its port. So this process stays: when the command ends or the asker dies, it kills what
is left of the group, which it leads. A file of its own, run by path, so that nothing else is imported. On Linux;
elsewhere only the end of the command is noticed.
"""

import contextlib
import ctypes
import os
import signal
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1
ORPHANED = signal.SIGUSR1


def kill_group(number: int = 0, frame: FrameType | None = None) -> None:
    """Ends every process of the group, this one included."""
    os.killpg(0, signal.SIGKILL)


def end_with_parent(number: int) -> None:
    """Has the kernel send us a signal when our parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def main(parent: int, command: list[str]) -> None:
    """Runs `command` until it ends or `parent` dies; SIGTERM is passed on to it."""
    child = 0

    def forward(number: int, frame: FrameType | None) -> None:
        if not child:
            kill_group()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    # Handlers, unlike SIG_IGN, do not pass to the command.
    signal.signal(ORPHANED, kill_group)
    signal.signal(signal.SIGTERM, forward)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    end_with_parent(ORPHANED)
    if os.getppid() != parent:
        sys.exit("the parent died first")
    child = os.fork()
    if child == 0:
        end_with_parent(signal.SIGKILL)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"{command[0]}: {error}", file=sys.stderr, flush=True)
            os._exit(127)
    os.waitpid(child, 0)
    kill_group()


if __name__ == "__main__":
    # A queue that asks a run to save signals all of its processes; the run alone answers.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    main(int(sys.argv[1]), sys.argv[2:])
