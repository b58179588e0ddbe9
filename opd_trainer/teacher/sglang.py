"""A teacher behind SGLang servers: scores each sample as it lands, while others are still being generated.

R = response tokens.
"""

import time

import torch

from opd_trainer.metrics import Metrics
from opd_trainer.opd.overlap import overlap, overlap_metrics
from opd_trainer.sglang.client import ClientConfig, SglangClient
from opd_trainer.sglang.endpoints import Endpoint
from opd_trainer.sglang.failure import RequestFailed
from opd_trainer.sglang.fleet import Fleet
from opd_trainer.sglang.wire import read_scored, score_body
from opd_trainer.teacher.config import ServerTeacher, key_of
from opd_trainer.teacher.failure import Tally, settle
from opd_trainer.teacher.preflight import ServerFacts, Student, examine, told
from opd_trainer.types import Sample, ScoreStatus, TopK


class SglangTeacher:
    """Scores samples; `score` is a `Judge`.

    Args:
        config: limits and failure policy.
        fleet: the servers.
        student: what the teacher must agree with; None skips the preflight's comparisons.
        name: as the samples call it (`Prompt.teacher`); samples of other teachers pass through.
        top_k: candidates to fetch at each position, for the overlap metrics.
    """

    def __init__(
        self,
        config: ServerTeacher,
        fleet: Fleet,
        student: Student | None = None,
        *,
        name: str = "default",
        top_k: int = 0,
    ) -> None:
        self.facts: ServerFacts | None = None
        self._config, self._fleet, self._student, self._name, self._top_k = config, fleet, student, name, top_k
        limits = ClientConfig(timeout_s=config.timeout_s, concurrency=config.concurrency, attempts=config.attempts)
        self.client = SglangClient(fleet.urls, limits, self._repair)
        self._key = key_of(name)
        self._tally = Tally()
        self._overlap = Metrics()
        self._seconds = 0.0
        self._cached_tokens = self._prompt_tokens = 0

    @property
    def temperature(self) -> float:
        """Of the log-probs that `score` gives: 1, unless the preflight found servers that honour the student's."""
        honoured = self.facts is not None and not self.facts.ignores_temperature and self._student is not None
        return self._student.temperature if honoured and self._student is not None else 1.0

    async def start(self) -> None:
        """Launches servers that are ours, and opens the connection.

        Raises:
            WorkerError: a server did not come up.
        """
        await self._fleet.start()
        await self.client.start()

    async def preflight(self) -> ServerFacts:
        """Refuses a teacher that cannot teach this student, and tells about one that can; call after `start`.

        Raises:
            PreflightError: all that is wrong with it, together.
        """
        self.facts = await examine(self.client, self._config, self._student, self._key)
        print(told(self._name, self.facts), flush=True)
        return self.facts

    async def score(self, sample: Sample) -> Sample:
        """The sample with `teacher_log_probs` f32[R] at `temperature`, `teacher_status`, `teacher_topk` if asked for.

        Raises:
            TeacherError: the scoring failed and `on_failure` is abort.
            WorkerError: a server of ours died too often.
        """
        if sample.prompt.teacher != self._name:
            return sample
        temperature = self.temperature
        if len(sample.response) == 0:
            return sample.replace(
                teacher_temperature=temperature,
                teacher_log_probs=torch.empty(0),
                teacher_topk=_no_candidates(self._top_k),
            )
        prompt, response = sample.prompt.tokens.tolist(), sample.response.tolist()
        start = time.monotonic()
        try:
            self._check_length(len(prompt) + len(response))
            body = score_body([*prompt, *response], len(prompt), self._top_k, temperature)
            scored = await self.client.generate(body, lambda answer: read_scored(answer, response, self._top_k))
        except RequestFailed as failure:
            self._tally.add(failure.status, str(failure))
            return settle(sample.replace(teacher_temperature=temperature), failure, self._config.on_failure, self._key)
        self._seconds += time.monotonic() - start
        self._tally.add(ScoreStatus.ok)
        self._cached_tokens += scored.cached_tokens
        self._prompt_tokens += len(prompt) + len(response)
        if sample.topk is not None and scored.topk is not None:
            self._overlap.update(overlap_metrics(overlap(sample.topk.ids, scored.topk)))
        return sample.replace(
            teacher_temperature=temperature,
            teacher_log_probs=scored.log_probs,
            teacher_topk=scored.topk,
            teacher_status=ScoreStatus.ok,
        )

    def metrics(self) -> Metrics:
        """Since the last call: outcomes, seconds per scored sample, share of cached tokens, retries, and how far its
        candidates are those of the engine; teacher/restarts since the servers were launched.

        Raises:
            TeacherError: more samples failed than `max_failed_fraction` allows.
        """
        scored = self._tally.counts[ScoreStatus.ok]
        metrics = self._tally.close(self._config.max_failed_fraction, self._key)
        if scored:
            metrics.put("teacher/latency_s", self._seconds / scored, scored)
            metrics.put("teacher/cached_token_fraction", self._cached_tokens / self._prompt_tokens)
        metrics.put("teacher/retries", self.client.num_retries)
        metrics.put("teacher/restarts", self._fleet.num_restarts)
        metrics.update(self._overlap)
        self._overlap = Metrics()
        self.client.num_retries, self._seconds, self._cached_tokens, self._prompt_tokens = 0, 0.0, 0, 0
        return metrics

    async def close(self) -> None:
        """Closes the connection and stops servers that are ours. Safe to call twice."""
        await self.client.close()
        await self._fleet.close()

    async def _repair(self, endpoint: Endpoint) -> None:
        if await self._fleet.ensure(endpoint.url):
            self.client.pool.succeeded(endpoint)

    def _check_length(self, length: int) -> None:
        limit = None if self.facts is None else self.facts.max_length
        if limit is not None and length + 1 > limit:
            detail = f"{length} tokens and one more exceed the teacher's context of {limit}"
            raise RequestFailed(ScoreStatus.too_long, detail)


def _no_candidates(top_k: int) -> TopK | None:
    if not top_k:
        return None
    return TopK(ids=torch.empty(0, top_k, dtype=torch.int64), log_probs=torch.empty(0, top_k))
