"""Where the ranks of a process group meet."""

import socket


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that is free on `host` now."""
    with socket.socket() as server:
        server.bind((host, 0))
        return server.getsockname()[1]


def local_rendezvous() -> str:
    """A torch.distributed init method (tcp://host:port) for ranks on this machine."""
    return f"tcp://127.0.0.1:{free_port()}"
