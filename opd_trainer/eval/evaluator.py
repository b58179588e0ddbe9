"""Answers to held-out prompts, graded: pass@k, mean reward, truncation, standard errors, and every answer on record."""

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from opd_trainer.data.prompts import PromptSet
from opd_trainer.errors import DataError
from opd_trainer.eval.config import EvalConfig
from opd_trainer.eval.statistics import Estimate, estimate, pass_at_k
from opd_trainer.metrics import Metrics
from opd_trainer.protocols import RolloutEngine
from opd_trainer.requests import requests_for
from opd_trainer.types import Finish, Sample, Sampling


class Grader(Protocol):
    """Puts rewards on samples."""

    @property
    def grades(self) -> bool:
        """Whether a reward tells right answers from wrong ones; there is no accuracy otherwise."""
        ...

    async def score(self, sample: Sample, group_size: int) -> Sample:
        """The sample with its reward, NaN where it could not be computed."""
        ...

    def metrics(self) -> Metrics:
        """Failures since the last call."""
        ...


@dataclass(frozen=True, slots=True)
class Record:
    """One graded answer, plain values.

    Attributes:
        correct: null when there is no reward.
        reward: null when it could not be computed.
        reward_parts: of a composite reward; what failed, when it failed.
    """

    dataset: str
    prompt_id: str
    index: int
    prompt: str
    response: str
    answer: str | None
    correct: bool | None
    reward: float | None
    reward_parts: Mapping[str, float]
    finish: str
    num_tokens: int
    version: int


@dataclass(frozen=True, slots=True)
class Report:
    """One evaluation.

    Attributes:
        metrics: ``eval/<dataset>/...``.
        records: every answer, by dataset, prompt and index.
    """

    metrics: Metrics
    records: Sequence[Record]


class Evaluator:
    """Grades a model's answers to fixed prompts.

    Randomness is keyed by (seed, "eval", prompt id, index), whatever the step: evaluations of the same weights agree.
    """

    def __init__(
        self, config: EvalConfig, held_out: Sequence[PromptSet], reward: Grader, sampling: Sampling, seed: int
    ) -> None:
        self._config, self._sets, self._grader, self._sampling = config, held_out, reward, sampling
        prompts = [prompt for prompts in held_out for prompt in prompts.prompts]
        self._requests = requests_for(prompts, config.samples_per_prompt, seed, "eval")

    async def run(self, engine: RolloutEngine) -> Report:
        """Answers of the weights that `engine` has now."""
        grading = [
            asyncio.create_task(self._grader.score(sample, self._config.samples_per_prompt))
            async for sample in engine.generate(self._requests, self._sampling)
        ]
        samples = {(sample.prompt.id, sample.index): sample for sample in await asyncio.gather(*grading)}
        # Failures are ours to report, below; the next training step must not count them.
        self._grader.metrics()
        records = [
            self._record(samples[request.prompt.id, request.index])
            for request in self._requests
            if (request.prompt.id, request.index) in samples
        ]
        metrics = Metrics()
        for prompts in self._sets:
            self._describe(prompts, [record for record in records if record.dataset == prompts.name], metrics)
        return Report(metrics, records)

    def accuracy(self, values: Mapping[str, float]) -> dict[str, float]:
        """Dataset -> pass@1, out of the metrics of a report; empty where nothing is graded."""
        if not self._grader.grades:
            return {}
        return {prompts.name: values[f"eval/{prompts.name}/pass@1"] for prompts in self._sets}

    def standard_errors(self, values: Mapping[str, float]) -> dict[str, float]:
        """Dataset -> standard error of pass@1, out of the metrics of a report; none for datasets of one prompt."""
        names = {prompts.name: f"eval/{prompts.name}/pass@1_se" for prompts in self._sets}
        return {dataset: values[name] for dataset, name in names.items() if name in values}

    def _record(self, sample: Sample) -> Record:
        known = self._grader.grades and math.isfinite(sample.reward) and sample.finish is not Finish.abort
        return Record(
            dataset=sample.prompt.dataset,
            prompt_id=sample.prompt.id,
            index=sample.index,
            prompt=sample.prompt.text,
            response=sample.text,
            answer=sample.prompt.answer,
            correct=self._is_correct(sample) if known else None,
            reward=sample.reward if known else None,
            reward_parts=dict(sample.reward_parts),
            finish=sample.finish.value,
            num_tokens=len(sample.response),
            version=sample.version,
        )

    def _is_correct(self, sample: Sample) -> bool:
        part = self._config.correct_part
        if part is None:
            return sample.reward > self._config.correct_above
        if part not in sample.reward_parts:
            raise DataError(
                f"eval.correct_part={part}: the reward has no such part, only {', '.join(sample.reward_parts)}. "
                "Set eval.correct_part to one of them, or to null for the whole reward"
            )
        return sample.reward_parts[part] > self._config.correct_above

    def _describe(self, prompts: PromptSet, records: Sequence[Record], metrics: Metrics) -> None:
        name = f"eval/{prompts.name}"
        if self._grader.grades:
            self._grade(prompts, records, metrics)
        if records:
            truncated = sum(record.finish == Finish.length for record in records)
            metrics.put(f"{name}/truncated_ratio", truncated / len(records))
            metrics.put(f"{name}/response_length", sum(record.num_tokens for record in records) / len(records))

    def _grade(self, prompts: PromptSet, records: Sequence[Record], metrics: Metrics) -> None:
        """pass@k and the mean reward; answers whose reward failed are left out, and counted."""
        name, n = f"eval/{prompts.name}", self._config.samples_per_prompt
        graded: dict[str, list[Record]] = {}
        for record in records:
            if record.correct is not None:
                graded.setdefault(record.prompt_id, []).append(record)
        for k in doublings(n):
            passed = [
                pass_at_k(len(group), sum(record.correct is True for record in group), k)
                for group in graded.values()
                if len(group) >= k
            ]
            put(metrics, f"{name}/pass@{k}", estimate(passed))
        rewards = [
            math.fsum(record.reward for record in group if record.reward is not None) / len(group)
            for group in graded.values()
        ]
        put(metrics, f"{name}/mean@{n}", estimate(rewards))
        expected = len(prompts.prompts) * n
        metrics.put(f"{name}/failed_fraction", 1 - sum(map(len, graded.values())) / expected)


def doublings(limit: int) -> Iterator[int]:
    """1, 2, 4, ... and `limit` itself."""
    k = 1
    while k < limit:
        yield k
        k *= 2
    yield limit


def put(metrics: Metrics, name: str, value: Estimate) -> None:
    """An estimate with its standard error where there is one."""
    metrics.put(name, value.value)
    if not math.isnan(value.standard_error):
        metrics.put(f"{name}_se", value.standard_error)
