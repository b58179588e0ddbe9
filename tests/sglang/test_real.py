"""Against a real SGLang server on CPU (`make test-sglang`): nothing here is left to belief."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_trainer.errors import PreflightError
from opd_trainer.megatron.families.registry import architecture_from_hf
from opd_trainer.megatron.huggingface import load_hf_weights
from opd_trainer.model.identity import profile
from opd_trainer.rollout.config import SyncVia
from opd_trainer.sglang.fleet import Fleet
from opd_trainer.teacher.config import SglangExternalTeacher
from opd_trainer.teacher.preflight import Student
from opd_trainer.teacher.sglang import SglangTeacher
from opd_trainer.types import Finish, Sample, ScoreStatus, WeightStream
from tests.megatron.models import build, pack, started
from tests.sglang.conversation import RECORDING, SEED, TURNS, shape, talk
from tests.sglang.models import EOS_ID, load_model, log_probs, sampled, save_tiny
from tests.sglang.real import FLOOR, check, collect, engine, largest, launch, prompt, requests, run, sample, stream
from tests.sglang.serving import sampling

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("initial"), SEED)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("trained"), SEED + 1)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet.launch("real", str(folder), launch(), tmp_path_factory.mktemp("logs"))
    start = time.monotonic()
    asyncio.run(fleet.start())
    print(f"\nSGLang was ready after {time.monotonic() - start:.0f} s")
    yield fleet
    asyncio.run(fleet.close())


def test_the_recording_is_up_to_date(server: Fleet, folder: Path) -> None:
    """Comes first: later tests change the weights. OPD_RECORD=1 records anew."""
    said = talk(server.urls[0])
    if os.environ.get("OPD_RECORD"):
        text = json.dumps(said, indent=1).replace(str(folder), "/models/tiny")
        RECORDING.write_text(text + "\n", encoding="utf-8")
    recorded = json.loads(RECORDING.read_text(encoding="utf-8"))
    assert list(said) == list(recorded) == [name for name, _, _ in TURNS]
    for name, turn in recorded.items():
        assert said[name]["status"] == turn["status"], name
        if name.startswith("score"):
            entries = [t["answer"]["meta_info"]["input_token_logprobs"] for t in (said[name], turn)]
            assert shape(entries[0]) == shape(entries[1])


def test_three_way_parity(server: Fleet, folder: Path, tmp_path: Path) -> None:
    """transformers, the Megatron teacher's model and the server agree on every token; the floor is printed."""
    samples = [sample(number, length) for number, length in enumerate((1, 7, 40, 200))]

    async def score() -> list[Sample]:
        teacher = SglangTeacher(SglangExternalTeacher(), Fleet(server.urls))
        await teacher.start()
        try:
            return list(await asyncio.gather(*(teacher.score(one) for one in samples)))
        finally:
            await teacher.close()

    results = run(score())
    reference = load_model(folder)
    rows = [torch.cat([one.prompt.tokens, one.response]) for one in samples]
    with started(tmp_path) as runtime, torch.no_grad():
        model = build(runtime, architecture_from_hf(json.loads((folder / "config.json").read_text())))
        load_hf_weights(model, folder)
        logits = model.forward(pack(rows)).split([len(row) for row in rows])
    gaps: dict[str, list[Tensor]] = {}
    for one, row, mine in zip(results, rows, logits, strict=True):
        assert one.teacher_status is ScoreStatus.ok
        assert one.teacher_log_probs is not None
        start = len(one.prompt.tokens)
        ours = mine.log_softmax(-1)[start - 1 : -1].gather(1, row[start:, None])[:, 0]
        theirs = sampled(reference, row[:start].tolist(), row[start:].tolist())
        for name, gap in (
            ("SGLang - transformers", one.teacher_log_probs - theirs),
            ("SGLang - Megatron", one.teacher_log_probs - ours),
            ("Megatron - transformers", ours - theirs),
        ):
            gaps.setdefault(name, []).append(gap)
    print("\nlargest difference of a token's log-prob, nats, fp32:")
    for name, parts in gaps.items():
        print(f"  {name:<25} {largest(torch.cat(parts)):.1e}")


def test_top_k(server: Fleet, folder: Path) -> None:
    async def work() -> Sample:
        teacher = SglangTeacher(SglangExternalTeacher(), Fleet(server.urls), top_k=5)
        await teacher.start()
        try:
            return await teacher.score(sample(3, 20))
        finally:
            await teacher.close()

    one = run(work())
    rows = log_probs(load_model(folder), [*one.prompt.tokens.tolist(), *one.response.tolist()])
    values, _ = rows[len(one.prompt.tokens) - 1 :].topk(5)
    assert one.teacher_topk is not None
    torch.testing.assert_close(one.teacher_topk.log_probs, values, atol=FLOOR, rtol=0)
    picked = rows[len(one.prompt.tokens) - 1 :].gather(1, one.teacher_topk.ids)
    torch.testing.assert_close(picked, values, atol=FLOOR, rtol=0)


def test_long_prompts_and_200_requests_at_once(server: Fleet, folder: Path) -> None:
    samples = [sample(number, 30, 440 if number % 20 == 0 else 6) for number in range(200)]

    async def work() -> list[Sample]:
        teacher = SglangTeacher(SglangExternalTeacher(concurrency=200, timeout_s=300.0), Fleet(server.urls))
        await teacher.start()
        try:
            await teacher.preflight()
            start = time.monotonic()
            results = await asyncio.gather(*(teacher.score(one) for one in [*samples, sample(999, 100, 412)]))
            print(f"\n{len(results)} samples scored in {time.monotonic() - start:.1f} s")
            return list(results)
        finally:
            await teacher.close()

    *results, too_long = run(work())
    model = load_model(folder)
    for one in results:
        assert one.teacher_status is ScoreStatus.ok
        expected = sampled(model, one.prompt.tokens.tolist(), one.response.tolist())
        torch.testing.assert_close(one.teacher_log_probs, expected, atol=FLOOR, rtol=0)
    assert too_long.teacher_status is ScoreStatus.too_long


def student(folder: Path, **changes: Any) -> Student:
    settings: dict[str, Any] = {
        "profile": profile(folder, folder),
        "probes": [prompt(number).tokens.tolist() for number in range(3)],
        "max_tokens": 128,
        "temperature": 1.0,
    }
    return Student(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"max_tokens": 512}, r"context of 512 tokens.*need 513"),
        ({"temperature": 0.7}, r"rollout.temperature: 0.7"),
    ],
)
def test_preflight(server: Fleet, folder: Path, changes: dict[str, Any], message: str | None) -> None:
    async def work() -> None:
        teacher = SglangTeacher(
            SglangExternalTeacher(check_trained=False), Fleet(server.urls), student(folder, **changes)
        )
        await teacher.start()
        try:
            facts = await teacher.preflight()
            assert facts.max_length == 512
            assert facts.ignores_temperature
        finally:
            await teacher.close()

    if message is None:
        run(work())
    else:
        with pytest.raises(PreflightError, match=message):
            run(work())


def test_a_teacher_that_lost_its_weights_is_refused(server: Fleet, folder: Path, tmp_path: Path) -> None:
    """Shows that they are looked at; the next test loads others."""

    async def zeros() -> AsyncIterator[list[tuple[str, Tensor]]]:
        yield [(name, torch.zeros_like(tensor)) for name, tensor in load_model(folder).state_dict().items()]

    async def work() -> None:
        rollout = engine(folder, tmp_path, server)
        await rollout.start()
        try:
            await rollout.load(WeightStream(version=0, buckets=zeros()))
        finally:
            await rollout.close()
        teacher = SglangTeacher(SglangExternalTeacher(), Fleet(server.urls), student(folder))
        await teacher.start()
        try:
            await teacher.preflight()
        finally:
            await teacher.close()

    with pytest.raises(PreflightError, match="uniform guess"):
        run(work())


@pytest.mark.parametrize("via", SyncVia)
def test_weights_arrive(server: Fleet, folder: Path, trained: Path, tmp_path: Path, via: SyncVia) -> None:
    async def work() -> None:
        rollout = engine(folder, tmp_path, server, sync_via=via)
        await rollout.start()
        try:
            for version, weights in enumerate((trained, folder, trained)):
                start = time.monotonic()
                await rollout.load(stream(weights, version))
                seconds = time.monotonic() - start
                samples = await collect(rollout, 4)
                worst = check(samples, weights)
                assert all(one.version == version for one in samples)
                print(f"\n{via} version {version}: {seconds:.2f} s, largest difference {worst:.1e} nats")
        finally:
            await rollout.close()

    run(work())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollouts(server: Fleet, folder: Path, tmp_path: Path, temperature: float) -> None:
    async def work() -> None:
        rollout = engine(folder, tmp_path, server)
        await rollout.start()
        try:
            await rollout.load(stream(folder, 5))
            # About half of the responses stop by themselves: that none of 16 does, or all do, is one in ten thousand.
            how = sampling(temperature=temperature, max_response_tokens=14, stop_token_ids=(3, 4), log_prob_top_k=3)
            samples = await collect(rollout, 16, how)
            check(samples, folder, temperature)
            assert Counter(one.prompt.id for one in samples) == Counter(f"p{n}" for n in range(16))
            for one in samples:
                ids = one.response.tolist()
                assert one.finish is (Finish.stop if ids[-1] in (EOS_ID, 3, 4) else Finish.length)
                assert not {EOS_ID, 3, 4} & set(ids[:-1])
                assert one.topk is not None
                assert one.topk.ids.shape == (len(ids), 3)
            assert {one.finish for one in samples} == {Finish.stop, Finish.length}
        finally:
            await rollout.close()

    run(work())


def test_a_server_without_weights_takes_those_that_are_sent(folder: Path, trained: Path, tmp_path: Path) -> None:
    """Its folder has a shape alone, as for a student in a Megatron checkpoint; it sleeps before it gets others."""
    shape = tmp_path / "shape"
    shape.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (shape / file.name).write_bytes(file.read_bytes())

    async def work() -> None:
        rollout = engine(shape, tmp_path, has_weights=False, sync_via=SyncVia.disk, release_memory=True)
        await rollout.start()
        try:
            await rollout.load(stream(folder, 0))
            check(await collect(rollout, 4), folder)
            async with rollout.asleep():
                await rollout.load(stream(trained, 1))
            check(await collect(rollout, 4), trained)
        finally:
            await rollout.close()

    run(work())


def test_stragglers(server: Fleet, folder: Path, tmp_path: Path) -> None:
    most = 300

    async def cut(straggler_after_s: float) -> list[Sample]:
        """What was left of 64 responses after some time, those that the server did not begin left out."""
        rollout = engine(folder, tmp_path, server, straggler_after_s=straggler_after_s, keep_partial=True)
        await rollout.start()
        try:
            await rollout.load(stream(folder, 6))
            samples = await collect(rollout, 64, sampling(max_response_tokens=most))
            assert len(samples) == 64
            return [one for one in samples if one.finish is Finish.length and len(one.response) < most]
        finally:
            await rollout.close()

    # A response ends by itself after 70 tokens on average. A busy machine has begun none yet when a calm one is done.
    for straggler_after_s in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
        late = run(cut(straggler_after_s))
        if late:
            break
    assert late
    check(late, folder)
    assert all(len(one.response) for one in late)


def test_kill_9_in_the_middle(folder: Path, trained: Path, tmp_path: Path) -> None:
    """A server of our own dies while it generates: it comes back with our weights, and nothing is lost."""

    async def work() -> None:
        rollout = engine(folder, tmp_path)
        await rollout.start()
        try:
            await rollout.load(stream(trained, 0))
            (process,) = rollout._fleet.servers.values()
            samples: list[Sample] = []
            start = time.monotonic()
            async for one in rollout.generate(requests(24), sampling(max_response_tokens=300)):
                samples.append(one)
                if len(samples) == 3:
                    assert process.pid is not None
                    os.killpg(process.pid, signal.SIGKILL)
            print(f"\n24 samples across a kill -9 in {time.monotonic() - start:.0f} s")
            assert Counter(one.prompt.id for one in samples) == Counter(f"p{n}" for n in range(24))
            assert all(one.finish is not Finish.abort for one in samples)
            check(samples, trained)
            assert process.num_restarts == 1
            await rollout.load(stream(folder, 1))
            check(await collect(rollout, 4), folder)
        finally:
            await rollout.close()

    run(work())
