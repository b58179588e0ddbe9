"""A rollout engine over fake servers in the test's own event loop; its weights are a table, one for each version."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd_trainer.rollout.config import SglangRollout, SyncVia
from opd_trainer.rollout.sglang.engine import SglangEngine, SglangSpec
from opd_trainer.sglang.fake_model import TableModel
from opd_trainer.types import Sample, Sampling, WeightStream
from tests.sglang.serving import VOCAB, Served, requests, sampling

Result = TypeVar("Result")
LIMIT_S = 300.0


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, LIMIT_S))


def table(version: int) -> Tensor:
    return TableModel(VOCAB, seed=100 + version).table


def stream(version: int, weights: Tensor | None = None) -> WeightStream:
    async def buckets() -> AsyncIterator[list[tuple[str, Tensor]]]:
        yield [("table", table(version) if weights is None else weights)]

    return WeightStream(version=version, buckets=buckets())


def engine(folder: Path, *servers: Served, **changes: Any) -> SglangEngine:
    rollout = SglangRollout(
        **{"urls": [s.url for s in servers], "timeout_s": 100.0, "sync_timeout_s": 100.0, **changes}
    )
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    return SglangEngine(
        SglangSpec(
            folder=folder / "model",
            eos_token_ids=(1,),
            decode=lambda responses: [" ".join(map(str, response)) for response in responses],
            rollout=rollout,
            run_dir=folder,
        )
    )


async def collect(rollout: SglangEngine, count: int, how: Sampling | None = None) -> list[Sample]:
    return [sample async for sample in rollout.generate(requests(count), how or sampling())]


def log_probs(sample: Sample, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """Of a response, by a table."""
    tokens = torch.cat([sample.prompt.tokens[-1:], sample.response])
    rows = (weights[tokens[:-1]] / temperature).log_softmax(-1)
    return rows.gather(1, sample.response[:, None])[:, 0]


IN_ONE_PROCESS = (SyncVia.tensor, SyncVia.disk)
"""A process group needs two; see tests/sglang/test_managed.py."""
