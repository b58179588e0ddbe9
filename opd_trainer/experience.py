"""Where samples come from: prompts, generation, and the judges (rewards, server teachers) that score samples.

N = samples of a step, T = their tokens laid end to end (prompt and response).
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from opd_trainer import jagged
from opd_trainer.data.stream import PromptStream
from opd_trainer.errors import DataError
from opd_trainer.metrics import Metrics
from opd_trainer.protocols import RolloutEngine
from opd_trainer.tracking.tracker import StepLog
from opd_trainer.types import Finish, Prompt, Request, Sample, Sampling, Scores, TokenBatch


class Judge(Protocol):
    """Adds a reward or a server teacher's log-probs to samples; a failure is a status, never an exception."""

    async def score(self, sample: Sample) -> Sample:
        """The sample with what the judge knows."""
        ...

    def metrics(self) -> Metrics:
        """What happened since the last call."""
        ...


class Experience(Protocol):
    """A source of training batches, one a step."""

    async def next(self, step: int, log: StepLog) -> TokenBatch:
        """The batch of `step`; what happened on the way goes to `log`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same prompts."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        ...


def request_seed(*key: int | str) -> int:
    """A seed in [0, 2^63) that depends on `key` alone: run seed, step, prompt id, sibling."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def requests_for(prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, phase: int | str) -> list[Request]:
    """`samples_per_prompt` requests for each prompt, seeded by (seed, phase, prompt id, sibling)."""
    return [
        Request(prompt=prompt, index=index, seed=request_seed(seed, phase, prompt.id, index))
        for prompt in prompts
        for index in range(samples_per_prompt)
    ]


def collate(samples: Sequence[Sample], temperature: float) -> TokenBatch:
    """Lays samples end to end; siblings (equal prompt id) become a group.

    Raises:
        DataError: there is no sample at all.
    """
    if not samples:
        raise DataError("a step ended without a single usable sample: every one was dropped (see rollout/dropped)")
    groups: dict[str, int] = {}
    lengths = torch.tensor([len(s.prompt.tokens) + len(s.response) for s in samples])
    blank = [torch.full((len(s.prompt.tokens),), float("nan")) for s in samples]
    behaviour = [part for s, nan in zip(samples, blank, strict=True) for part in (nan, s.log_probs)]
    teacher = None
    if any(s.teacher_log_probs is not None for s in samples):
        parts: list[torch.Tensor] = []
        for sample, nan in zip(samples, blank, strict=True):
            unknown = torch.full((len(sample.response),), float("nan"))
            parts += [nan, unknown if sample.teacher_log_probs is None else sample.teacher_log_probs]
        # A server teacher ignores the sampling temperature: its log-probs are those of temperature 1.
        teacher = Scores(log_probs=torch.cat(parts), temperature=1.0, model="teacher")
    return TokenBatch(
        tokens=torch.cat([part for s in samples for part in (s.prompt.tokens, s.response)]),
        seq=jagged.seq_from_lengths(lengths),
        mask=torch.cat(
            [part for s in samples for part in (torch.zeros(len(s.prompt.tokens)), torch.ones(len(s.response)))]
        ).bool(),
        group=torch.tensor([groups.setdefault(s.prompt.id, len(groups)) for s in samples]),
        reward=torch.tensor([s.reward for s in samples], dtype=torch.float32),
        truncated=torch.tensor([s.finish is Finish.length for s in samples]),
        teacher_name=tuple(s.prompt.teacher for s in samples),
        rollout=Scores(log_probs=torch.cat(behaviour), temperature=temperature, model="rollout"),
        version=torch.tensor([s.version for s in samples]),
        teacher=teacher,
    )


def describe(samples: Sequence[Sample], num_dropped: int) -> Metrics:
    """Rollout metrics of a step: rewards, lengths, truncation, diversity of the groups."""
    metrics = Metrics()
    lengths = torch.tensor([len(s.response) for s in samples], dtype=torch.float32)
    for name, value in (("mean", lengths.mean()), ("max", lengths.max()), ("min", lengths.min())):
        metrics.put(f"rollout/response_length/{name}", value)
    metrics.put("rollout/truncated_ratio", sum(s.finish is Finish.length for s in samples) / len(samples))
    metrics.put("rollout/dropped", num_dropped)
    metrics.put("rollout/reward", sum(s.reward for s in samples) / len(samples))
    log_probs = torch.cat([s.log_probs for s in samples])
    metrics.mean("rollout/log_prob", log_probs, torch.isfinite(log_probs))
    groups: dict[str, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt.id, []).append(sample.reward)
        for part, value in sample.reward_parts.items():
            if part != "reward":
                metrics.put(f"rollout/reward/{part}", value)
    metrics.put("rollout/zero_std_fraction", sum(len(set(rewards)) == 1 for rewards in groups.values()) / len(groups))
    return metrics


@dataclass(slots=True)
class OnPolicyExperience:
    """Every sample of a step is generated by the current weights, and judged while others still generate."""

    stream: PromptStream
    engine: RolloutEngine
    judges: Sequence[Judge]
    sampling: Sampling
    prompts_per_step: int
    samples_per_prompt: int
    seed: int

    async def next(self, step: int, log: StepLog) -> TokenBatch:
        """Generates and judges the samples of `step`."""
        requests = requests_for(self.stream.next(self.prompts_per_step), self.samples_per_prompt, self.seed, step)
        order = {(request.prompt.id, request.index): rank for rank, request in enumerate(requests)}
        with log.time("rollout"):
            judging = [
                asyncio.create_task(self.judge(sample))
                async for sample in self.engine.generate(requests, self.sampling)
            ]
            samples = sorted(await asyncio.gather(*judging), key=lambda s: order[s.prompt.id, s.index])
        usable = [s for s in samples if s.reward == s.reward and s.finish is not Finish.abort]
        batch = collate(usable, self.sampling.temperature)
        log.add(describe(usable, len(requests) - len(usable)))
        for judge in self.judges:
            log.add(judge.metrics())
        log.samples(usable)
        return batch

    async def judge(self, sample: Sample) -> Sample:
        """Each judge in turn adds what it knows."""
        for judge in self.judges:
            sample = await judge.score(sample)
        return sample

    def state_dict(self) -> dict[str, Any]:
        """The cursor into the prompts."""
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.stream.load_state_dict(state["stream"])
