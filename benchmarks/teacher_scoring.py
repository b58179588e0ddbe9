"""Teacher scoring: our client, overlapping generation, against one new session per sample after it; same server.

    python benchmarks/teacher_scoring.py                                   # the fake server, in a process of its own
    OPD_SGLANG_PYTHON=... python benchmarks/teacher_scoring.py --real      # a real SGLang server (see make test-sglang)

The other side is what slime does (slime/rollout/on_policy_distillation.py): a new aiohttp session for every sample, no
bound, and `logprob_start_len: 0`, whose answer holds the prompt's log-probs as well. Samples land at the same,
simulated moments on both sides; ours are scored as they land, the others when all have landed. The two alternate, and
the medians are reported, and written with every round to --json.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import torch

from opd_trainer.sglang.config import LaunchConfig
from opd_trainer.sglang.fleet import Fleet
from opd_trainer.teacher.config import SglangExternalTeacher
from opd_trainer.teacher.sglang import SglangTeacher
from opd_trainer.types import Finish, Prompt, Sample, ScoreStatus


@dataclass(frozen=True)
class Round:
    """One pass over the samples."""

    seconds: float
    cpu_s: float
    scoring_s: float


def make_samples(count: int, prompt_tokens: int, response_tokens: int, vocab_size: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(count):
        prompt = torch.randint(2, vocab_size, (prompt_tokens,), generator=generator)
        response = torch.randint(2, vocab_size, (response_tokens,), generator=generator)
        samples.append(
            Sample(
                prompt=Prompt(id=str(number), tokens=prompt, text=""),
                index=0,
                response=response,
                log_probs=torch.zeros(response_tokens),
                finish=Finish.length,
                version=0,
                text="",
            )
        )
    return samples


async def ours(samples: list[Sample], url: str, spread_s: float) -> Round:
    teacher = SglangTeacher(SglangExternalTeacher(timeout_s=300.0), Fleet([url]))
    await teacher.start()
    start, cpu = time.perf_counter(), time.process_time()
    tasks = []
    for sample in samples:
        tasks.append(asyncio.create_task(teacher.score(sample)))
        await asyncio.sleep(spread_s / len(samples))
    landed = time.perf_counter()
    results = await asyncio.gather(*tasks)
    end = time.perf_counter()
    cpu_s = time.process_time() - cpu
    await teacher.close()
    assert all(result.teacher_status is ScoreStatus.ok for result in results)
    return Round(end - start, cpu_s, end - landed)


async def one_session_each(samples: list[Sample], url: str, spread_s: float) -> Round:
    async def score(sample: Sample) -> torch.Tensor:
        tokens = torch.cat([sample.prompt.tokens, sample.response]).tolist()
        payload = {
            "input_ids": tokens,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0, "skip_special_tokens": False},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        timeout = aiohttp.ClientTimeout(total=None)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(f"{url}/generate", json=payload) as r,
        ):
            answer = await r.json()
        entries = answer["meta_info"]["input_token_logprobs"][1:]
        return torch.tensor([entry[0] for entry in entries])[-len(sample.response) :]

    start, cpu = time.perf_counter(), time.process_time()
    for _ in samples:
        await asyncio.sleep(spread_s / len(samples))
    landed = time.perf_counter()
    await asyncio.gather(*(score(sample) for sample in samples))
    end = time.perf_counter()
    return Round(end - start, time.process_time() - cpu, end - landed)


async def compare(url: str, options: argparse.Namespace) -> None:
    samples = make_samples(options.samples, options.prompt_tokens, options.response_tokens, options.vocab_size)
    ways = {"opd_trainer": ours, "session per sample": one_session_each}
    await ours(samples[:8], url, 0.0)
    await one_session_each(samples[:8], url, 0.0)
    rounds: dict[str, list[Round]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            rounds[name].append(await way(samples, url, options.generation_s))
    print(
        f"{options.samples} samples of {options.prompt_tokens} + {options.response_tokens} tokens, landing within "
        f"{options.generation_s:g} s; medians of {options.rounds} rounds"
    )
    print(f"{'':<20} {'samples/s':>10} {'after the last landed, s':>25} {'controller CPU, ms/sample':>26}")
    report = {
        "settings": {**vars(options), "model": None},
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "ways": {},
    }
    for name, passes in rounds.items():
        total, after, cpu = (
            statistics.median(getattr(one, field) for one in passes) for field in ("seconds", "scoring_s", "cpu_s")
        )
        print(f"{name:<20} {len(samples) / total:>10.1f} {after:>25.2f} {1000 * cpu / len(samples):>26.2f}")
        report["ways"][name] = {
            "samples_per_s": len(samples) / total,
            "after_the_last_landed_s": after,
            "controller_cpu_ms_per_sample": 1000 * cpu / len(samples),
            "rounds": [dataclasses.asdict(one) for one in passes],
        }
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="launch SGLang with the Python of OPD_SGLANG_PYTHON")
    parser.add_argument("--model", help="Hugging Face folder; needed with --real")
    parser.add_argument("--vocab-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--response-tokens", type=int, default=128)
    parser.add_argument("--generation-s", type=float, default=3.0, help="time over which samples land")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.real and not options.model:
        parser.error("--real needs --model")
    launch = LaunchConfig(module="opd_trainer.sglang.fake")
    if options.real:
        launch = LaunchConfig(python=os.environ["OPD_SGLANG_PYTHON"], dtype="float32")
    model = options.model or f"table:{options.vocab_size}:0"
    with tempfile.TemporaryDirectory() as logs:
        fleet = Fleet.launch("benchmark", model, launch, Path(logs))
        await fleet.start()
        try:
            await compare(fleet.urls[0], options)
        finally:
            await fleet.close()


if __name__ == "__main__":
    asyncio.run(main())
