"""The fake server inside a test's own event loop, and samples to score."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from aiohttp import web

from opd_trainer.cluster.rendezvous import free_port
from opd_trainer.sglang.fake import application
from opd_trainer.sglang.fake_model import TableModel
from opd_trainer.sglang.fake_state import FakeState
from opd_trainer.types import Finish, Prompt, Request, Sample, Sampling

VOCAB = 32


class Served:
    """A fake server that can be stopped and started again on the same port."""

    def __init__(self, state: FakeState) -> None:
        self.state = state
        self.port = free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        self._runner: web.AppRunner | None = None

    async def up(self) -> None:
        self._runner = web.AppRunner(application(self.state), shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def down(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()


@asynccontextmanager
async def fake(**state: Any) -> AsyncIterator[Served]:
    state.setdefault("make_model", table_model)
    served = Served(FakeState(**state))
    await served.up()
    try:
        yield served
    finally:
        await served.down()


def table_model() -> TableModel:
    return TableModel(VOCAB)


def prompt(number: int = 0, length: int = 5, teacher: str = "default") -> Prompt:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(2, 20, (length,), generator=generator)
    return Prompt(id=f"p{number}", tokens=tokens, text="", teacher=teacher)


def sample(number: int = 0, length: int = 7, **changes: Any) -> Sample:
    generator = torch.Generator().manual_seed(1000 + number)
    made = Sample(
        prompt=prompt(number),
        index=0,
        response=torch.randint(2, 20, (length,), generator=generator),
        log_probs=torch.full((length,), -2.0),
        finish=Finish.stop,
        version=0,
        text="",
    )
    return made.replace(**changes)


def requests(count: int) -> list[Request]:
    return [Request(prompt=prompt(number), index=0, seed=number + 1) for number in range(count)]


def sampling(**changes: Any) -> Sampling:
    settings: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_response_tokens": 12,
        "stop_token_ids": (),
    }
    return Sampling(**{**settings, **changes})


def expected(model: TableModel, scored: Sample) -> torch.Tensor:
    """What the table model says about a sample's response."""
    tokens = torch.cat([scored.prompt.tokens, scored.response])
    rows = model.table[tokens[len(scored.prompt.tokens) - 1 : -1]].log_softmax(-1)
    return rows.gather(1, scored.response[:, None])[:, 0]
