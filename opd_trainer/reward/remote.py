"""A reward from an HTTP server: one session, bounded connections, a time limit and retries per sample."""

import asyncio
from typing import Any

import aiohttp
import tenacity

from opd_trainer.errors import WorkerError
from opd_trainer.reward.config import RemoteReward
from opd_trainer.reward.parts import parts_of
from opd_trainer.types import Sample

RETRIED_STATUS = frozenset({429, 500, 502, 503, 504})


class Busy(Exception):
    """The server answered that it cannot answer now."""


class Remote:
    """See `RemoteReward`."""

    def __init__(self, config: RemoteReward) -> None:
        self._config = config
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(config.max_connections)

    async def __call__(self, sample: Sample, group_size: int) -> dict[str, float]:
        """What the server says.

        Raises:
            TimeoutError: every attempt took longer than `timeout_s`.
            WorkerError: the server cannot be reached, refuses, or answers something else than a reward.
        """
        question = {
            "prompt": sample.prompt.text,
            "response": sample.text,
            "label": sample.prompt.answer,
            "metadata": dict(sample.prompt.metadata),
        }
        attempts = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._config.retries + 1),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5.0),
            retry=tenacity.retry_if_exception_type((aiohttp.ClientConnectionError, TimeoutError, Busy)),
            reraise=True,
        )
        try:
            async with self._slots:
                return parts_of(await attempts(self._post, question), f"the server {self._config.url}")
        except TimeoutError as error:
            limit = f"reward.timeout_s={self._config.timeout_s:g}"
            raise TimeoutError(f"reward server {self._config.url}: every answer took longer than {limit}") from error
        except (aiohttp.ClientError, Busy, ValueError) as error:
            raise WorkerError(f"reward server {self._config.url}: {type(error).__name__}: {error}") from error

    async def _post(self, question: dict[str, Any]) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._config.timeout_s))
        async with self._session.post(self._config.url, json=question) as response:
            if response.status in RETRIED_STATUS:
                raise Busy(f"status {response.status}: {(await response.text())[:200]}")
            if response.status != 200:
                raise WorkerError(
                    f"reward server {self._config.url}: status {response.status}: {(await response.text())[:200]}"
                )
            return await response.json(content_type=None)

    async def close(self) -> None:
        """Closes the session. Safe to call twice."""
        if self._session is not None:
            await self._session.close()
            self._session = None
