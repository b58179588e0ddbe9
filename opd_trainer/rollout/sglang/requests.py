"""Requests on their way through servers: bounded, timed, aborted when they lag; each gives exactly one sample."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import torch

from opd_trainer.errors import WorkerError
from opd_trainer.sglang.client import SglangClient
from opd_trainer.sglang.failure import RequestFailed
from opd_trainer.sglang.wire import Generated, generate_body, read_generated
from opd_trainer.types import Finish, Request, Sample, Sampling, ScoreStatus

ABORT_GRACE_S = 15.0
"""How long an aborted request may take to return what it has."""
ABORT_AGAIN_S = 1.0
"""Between orders to abort: requests that waited for their turn, or are tried again, reach a server after the first."""


@dataclass(slots=True, kw_only=True)
class Batch:
    """One call of `generate`.

    Attributes:
        client: reaches the servers.
        sampling: how to draw.
        stop_token_ids: tokens that end a response.
        version: of the weights that must have sampled.
        decode: token ids -> texts.
        straggler_after_s: when what is unfinished is aborted; None never.
        keep_partial: aborted responses that have a token count as truncated.
        failures: details of requests that no server answered.
    """

    client: SglangClient
    sampling: Sampling
    stop_token_ids: tuple[int, ...]
    version: int
    decode: Callable[[list[list[int]]], list[str]]
    straggler_after_s: float | None
    keep_partial: bool
    failures: list[str] = field(default_factory=list)
    _serial: "itertools.count[int]" = field(default_factory=itertools.count)

    async def run(self, requests: Sequence[Request]) -> AsyncGenerator[Sample, None]:
        """Yields each sample as it finishes.

        Raises:
            WorkerError: a server refused a request: every other would be refused as well.
        """
        loop = asyncio.get_running_loop()
        late = None if self.straggler_after_s is None else loop.time() + self.straggler_after_s
        abort_at = late
        tasks = {asyncio.ensure_future(self._one(request)): request for request in requests}
        pending = set(tasks)
        aborted = False
        try:
            while pending:
                left = None if abort_at is None else max(abort_at - loop.time(), 0.0)
                done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
                if late is None or abort_at is None or not pending or loop.time() < abort_at:
                    continue
                if loop.time() > late + ABORT_GRACE_S:
                    for task in pending:
                        yield self._empty(tasks[task])
                    return
                await self._abort_all()
                aborted, abort_at = True, loop.time() + ABORT_AGAIN_S
        finally:
            for task in pending:
                task.cancel()
            if pending and not aborted:
                await self._abort_all()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _one(self, request: Request) -> Sample:
        rid = f"opd-{self.version}-{id(self):x}-{next(self._serial)}"
        body = generate_body(
            request.prompt.tokens.tolist(), self.sampling, self.stop_token_ids, seed=request.seed, rid=rid
        )
        try:
            generated = await self.client.generate(body, self._read)
        except RequestFailed as failure:
            if not failure.transient:
                raise WorkerError(f"rollout: prompt {request.prompt.id} was not answered: {failure}") from failure
            self.failures.append(str(failure))
            return self._empty(request)
        return self._sample(request, generated)

    def _read(self, answer: object) -> Generated:
        generated = read_generated(answer, self.sampling.log_prob_top_k)
        if generated.weight_version != str(self.version):
            raise RequestFailed(
                ScoreStatus.misaligned,
                f"sampled by weights {generated.weight_version!r}, not {self.version}: the server was started anew",
                transient=True,
            )
        return generated

    def _sample(self, request: Request, generated: Generated) -> Sample:
        finish = generated.finish
        if finish is Finish.abort and self.keep_partial and len(generated.tokens):
            finish = Finish.length
        return Sample(
            prompt=request.prompt,
            index=request.index,
            response=generated.tokens,
            log_probs=generated.log_probs,
            finish=finish,
            version=self.version,
            text=self.decode([generated.tokens.tolist()])[0],
            topk=generated.topk,
        )

    def _empty(self, request: Request) -> Sample:
        return Sample(
            prompt=request.prompt,
            index=request.index,
            response=torch.empty(0, dtype=torch.int64),
            log_probs=torch.empty(0),
            finish=Finish.abort,
            version=self.version,
            text="",
        )

    async def _abort_all(self) -> None:
        """Tells every server; those that do not hear it are no reason to stop."""
        endpoints = self.client.pool.endpoints
        asked = (self.client.ask(endpoint, "/abort_request", {"rid": "", "abort_all": True}) for endpoint in endpoints)
        await asyncio.gather(*asked, return_exceptions=True)
