"""Where the ranks of a process group meet."""

import random
import socket

PORTS = range(20000, 32000)
"""Below those that systems give to clients, which could take a port between its choice and its use; and not among those
that Ray uses by itself."""


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that is free on `host` now.

    Raises:
        OSError: there is none, or `host` is not this machine.
    """
    # Not the generator that a run seeds: two runs with one seed would want the same port.
    ports = random.SystemRandom().sample(PORTS, 100)
    while True:
        port = ports.pop()
        with socket.socket() as server:
            try:
                server.bind((host, port))
            except OSError:
                if not ports:
                    raise
            else:
                return port


def local_rendezvous() -> str:
    """A torch.distributed init method (tcp://host:port) for ranks on this machine."""
    return f"tcp://127.0.0.1:{free_port()}"
