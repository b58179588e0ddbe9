"""New processes for tests, forked from a server that has imported what they need."""

from typing import Any

from torch import multiprocessing


def context() -> Any:
    """Where `Process` and `Queue` come from; functions to run are defined at the top of a module."""
    server: Any = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.preload"])
    return server
