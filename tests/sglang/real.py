"""Real SGLang servers on CPU, for the tests of them: how they are launched, asked and compared with transformers."""

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd_trainer.rollout.config import SglangRollout
from opd_trainer.rollout.sglang.engine import SglangEngine, SglangSpec
from opd_trainer.sglang.config import LaunchConfig
from opd_trainer.sglang.fleet import Fleet
from opd_trainer.types import Finish, Prompt, Request, Sample, Sampling, WeightStream
from tests.sglang.models import EOS_ID, VOCAB_SIZE, load_model, sampled
from tests.sglang.serving import sampling

Result = TypeVar("Result")
FLOOR = 1e-4
"""Nats: fp32 on both sides."""


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 900))


def python() -> str:
    found = os.environ.get("OPD_SGLANG_PYTHON")
    assert found, "run `make test-sglang`: it builds the environment and sets OPD_SGLANG_PYTHON"
    return found


def launch() -> LaunchConfig:
    return LaunchConfig(python=python(), dtype="float32", start_timeout_s=600.0)


def prompt(number: int, length: int = 6) -> Prompt:
    generator = torch.Generator().manual_seed(number)
    return Prompt(id=f"p{number}", tokens=torch.randint(2, 60, (length,), generator=generator), text="")


def requests(count: int) -> list[Request]:
    return [Request(prompt=prompt(number), index=0, seed=number) for number in range(count)]


def sample(number: int, length: int, prompt_length: int = 6) -> Sample:
    generator = torch.Generator().manual_seed(7000 + number)
    return Sample(
        prompt=prompt(number, prompt_length),
        index=0,
        # The last id too, which SGLang tells as 0.
        response=torch.randint(2, VOCAB_SIZE, (length,), generator=generator),
        log_probs=torch.zeros(length),
        finish=Finish.stop,
        version=0,
        text="",
    )


def stream(folder: Path, version: int, size: int = 8) -> WeightStream:
    named = list(load_model(folder).state_dict().items())

    async def buckets() -> AsyncIterator[list[tuple[str, Tensor]]]:
        for start in range(0, len(named), size):
            yield named[start : start + size]

    return WeightStream(version=version, buckets=buckets())


def engine(
    folder: Path, run_dir: Path, fleet: Fleet | None = None, *, has_weights: bool = True, **changes: Any
) -> SglangEngine:
    settings: dict[str, Any] = {"launch": launch(), "sync_timeout_s": 200.0, "timeout_s": 300.0, **changes}
    return SglangEngine(
        SglangSpec(
            folder=folder,
            eos_token_ids=(EOS_ID,),
            decode=lambda responses: ["" for _ in responses],
            rollout=SglangRollout(**settings),
            run_dir=run_dir,
            has_weights=has_weights,
        ),
        # Not closed with the engine: the server is shared by all tests.
        Fleet(fleet.urls) if fleet else None,
    )


async def collect(rollout: SglangEngine, count: int, how: Sampling | None = None) -> list[Sample]:
    return [one async for one in rollout.generate(requests(count), how or sampling(max_response_tokens=24))]


def check(samples: list[Sample], folder: Path, temperature: float = 1.0) -> float:
    model = load_model(folder)
    return largest(
        torch.cat(
            [
                one.log_probs - sampled(model, one.prompt.tokens.tolist(), one.response.tolist(), temperature)
                for one in samples
            ]
        )
    )


def largest(gaps: Tensor) -> float:
    """The largest size of a gap, below the floor. Finite: Python's max(0.0, nan) is 0.0, which would hide a failure."""
    assert gaps.numel()
    assert gaps.isfinite().all()
    worst = float(gaps.abs().max())
    assert worst < FLOOR
    return worst
