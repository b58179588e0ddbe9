"""The fake server against a recorded conversation of the real one, so that it cannot drift."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from opd_trainer.sglang.fake_model import TransformersModel
from tests.sglang.conversation import RECORDING, SEED, TURNS, comparable, differences, shape, talk
from tests.sglang.models import save_tiny
from tests.sglang.serving import fake

RANDOM = {"generate"}
"""Turns whose answer depends on the server's random numbers."""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = save_tiny(tmp_path_factory.mktemp("model"), SEED)

    async def work() -> dict[str, Any]:
        async with fake(make_model=lambda: TransformersModel(folder), model_path=str(folder)) as server:
            return await asyncio.to_thread(talk, server.url)

    return asyncio.run(asyncio.wait_for(work(), 300))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(RECORDING.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [name for name, _, _ in TURNS])
def test_answers_have_the_recorded_shape(said: dict[str, Any], recorded: dict[str, Any], name: str) -> None:
    assert said[name]["status"] == recorded[name]["status"]
    real, ours = (shape(comparable(turn)) for turn in (recorded[name], said[name]))
    assert differences(real, ours) == []


@pytest.mark.parametrize("name", ["score", "score at another temperature", "greedy"])
def test_log_probs_and_ids_are_the_recorded_ones(said: dict[str, Any], recorded: dict[str, Any], name: str) -> None:
    for key in ("input_token_logprobs", "output_token_logprobs"):
        real, ours = (turn[name]["answer"]["meta_info"][key] for turn in (recorded, said))
        assert [entry[1] for entry in ours] == [entry[1] for entry in real]
        known = [(a[0], b[0]) for a, b in zip(real, ours, strict=True) if a[0] is not None]
        assert all(abs(a - b) < 1e-4 for a, b in known)
        assert [entry[0] is None for entry in ours] == [entry[0] is None for entry in real]


def test_what_the_client_reads_was_said_by_the_real_server(recorded: dict[str, Any]) -> None:
    meta = recorded["generate"]["answer"]["meta_info"]
    assert {"finish_reason", "weight_version", "completion_tokens", "output_token_logprobs"} <= meta.keys()
    assert len(meta["output_token_logprobs"]) == len(meta["output_top_logprobs"]) == meta["completion_tokens"]
    scored = recorded["score"]["answer"]["meta_info"]
    assert scored["input_token_logprobs"][0][0] is None
    assert scored["input_top_logprobs"][0] is None
    assert {"tp_size", "max_req_input_len", "context_length"} <= recorded["server_info"]["answer"].keys()
    assert {"model_path", "weight_version"} <= recorded["model_info"]["answer"].keys()
