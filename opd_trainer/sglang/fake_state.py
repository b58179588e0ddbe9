"""What the fake server knows, and how it refuses."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from opd_trainer.sglang.fake_model import FakeModel
from opd_trainer.sglang.faults import Faults

VERSION = "0.5.23"
OLD_VERSION = "0.5.3"
"""What an older API (without weight-update sessions) reports."""


class Refused(Exception):
    """A request that SGLang answers with 400."""


class Crashed(Exception):
    """A request that SGLang 0.5.23 dies of: a token id beyond its vocabulary, weights for memory that it gave back."""


@dataclass(slots=True)
class Running:
    """A generation under way; set `aborted` to end it."""

    aborted: bool = False


@dataclass(slots=True)
class FakeState:
    """What the server knows.

    Attributes:
        make_model: builds the model of a fresh process.
        model_path: what it says it serves.
        sessions: of a newer SGLang, where weight updates from tensors need /begin_weight_update, and where
            /get_model_info and /get_server_info have got names without get_.
        honour_temperature: scores prompts at the request's temperature, which SGLang does not.
        token_s: seconds that a generated token takes.
        breaking: paths of control requests; the connection of the next one to each breaks before an answer.
    """

    make_model: Callable[[], FakeModel]
    model_path: str = "fake"
    sessions: bool = True
    honour_temperature: bool = False
    token_s: float = 0.0
    breaking: set[str] = field(default_factory=set)
    faults: Faults = field(default_factory=Faults)
    weight_version: str = "default"
    calls: list[str] = field(default_factory=list)
    running: dict[str, Running] = field(default_factory=dict)
    updating: bool = False
    released: set[str] = field(default_factory=set)
    groups: dict[str, Any] = field(default_factory=dict)
    unpaused: asyncio.Event = field(default_factory=asyncio.Event)
    model: FakeModel = field(init=False)
    serial: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Back to the state of a fresh process: initial weights, no groups, nothing running."""
        self.model, self.weight_version = self.make_model(), "default"
        self.updating = False
        self.released.clear()
        self.groups.clear()
        self.unpaused.set()
