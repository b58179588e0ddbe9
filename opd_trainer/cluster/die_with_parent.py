"""Runs a command that the kernel kills when the process that asked for it dies: `die_with_parent.py PID COMMAND...`.

A file of its own, run by path, so that nothing else is imported between fork and exec. On Linux; elsewhere the command
just runs.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("the parent died first")
    os.execvp(command[0], command)
