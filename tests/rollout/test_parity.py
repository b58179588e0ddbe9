import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_trainer.errors import WorkerError
from opd_trainer.rollout.config import SglangRollout
from opd_trainer.rollout.sglang.engine import SglangEngine, SglangSpec
from opd_trainer.rollout.sglang.parity import ParityCheck
from opd_trainer.sglang.fake_model import TableModel
from opd_trainer.types import TokenBatch, WeightStream
from tests.sglang.serving import VOCAB, fake, prompt, sampling


class TableLearner:
    """Scores with a table."""

    def __init__(self, seed: int) -> None:
        self.table = TableModel(VOCAB, seed).table

    async def score(self, batch: TokenBatch, model: str) -> Tensor:
        assert model == "student"
        before = torch.cat([batch.tokens[:1], batch.tokens[:-1]])
        own = self.table[before].log_softmax(-1).gather(1, batch.tokens[:, None])[:, 0]
        return torch.where(batch.mask, own, float("nan"))


async def gap(learner: Any, tmp_path: Any, max_gap: float = 0.2) -> float:
    async def buckets() -> AsyncIterator[list[tuple[str, Tensor]]]:
        yield [("table", TableModel(VOCAB, 1).table)]

    async with fake() as server:
        spec = SglangSpec(
            folder=tmp_path,
            eos_token_ids=(1,),
            decode=lambda responses: ["" for _ in responses],
            rollout=SglangRollout(urls=[server.url]),
            run_dir=tmp_path,
        )
        engine = SglangEngine(spec)
        await engine.start()
        try:
            await engine.load(WeightStream(version=0, buckets=buckets()))
            return await ParityCheck([prompt(n) for n in range(6)], sampling(), 0, learner, max_gap)(engine)
        finally:
            await engine.close()


def test_the_same_weights_agree(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert asyncio.run(gap(TableLearner(1), tmp_path)) < 1e-5
    assert "agree to" in capsys.readouterr().out


def test_other_weights_stop_the_run(tmp_path: Any) -> None:
    with pytest.raises(WorkerError, match=r"nats per token off .*max_parity_gap=0.2"):
        asyncio.run(gap(TableLearner(2), tmp_path))


def test_an_unknown_log_prob_stops_the_run(tmp_path: Any) -> None:
    learner = TableLearner(1)
    learner.table[:] = float("nan")
    with pytest.raises(WorkerError, match="nan nats"):
        asyncio.run(gap(learner, tmp_path))
