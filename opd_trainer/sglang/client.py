"""One HTTP client for all servers of a kind: one session, bounded concurrency, timeouts, retries, load balancing."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from opd_trainer.errors import OpdError
from opd_trainer.sglang.endpoints import Endpoint, Pool
from opd_trainer.sglang.failure import RequestFailed
from opd_trainer.types import ScoreStatus

Answer = TypeVar("Answer")

Repair = Callable[[Endpoint], Awaitable[None]]
"""Brings a server that failed back if it can: starts it again, gives it the weights that it lost."""

KEEPALIVE_S = 2.0
"""How long an idle connection is used again; SGLang closes it after 5 s, and a request that meets this fails."""
CONTROL_TIMEOUT_S = 10.0
"""Limit on questions that cost the server nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Limits of a client.

    Attributes:
        timeout_s: of one attempt, connecting and reading included.
        concurrency: requests under way at once, over all servers.
        attempts: tries of a request before it counts as failed, >= 1.
        backoff_s: shortest wait before the second try; doubles with each further one, with as much again at random.
        longest_backoff_s: bound on that wait.
    """

    timeout_s: float
    concurrency: int
    attempts: int
    backoff_s: float = 0.5
    longest_backoff_s: float = 10.0


class SglangClient:
    """Talks to servers that hold the same model.

    Args:
        urls: where they are.
        config: limits.
        repair: called after a failure that may pass, before the next attempt.
    """

    def __init__(self, urls: Sequence[str], config: ClientConfig, repair: Repair | None = None) -> None:
        self.pool = Pool.of(urls)
        self.config = config
        self.num_retries = 0
        self._repair = repair
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(config.concurrency)

    async def start(self) -> None:
        """Opens the session. Safe to call twice."""
        if self._session is None:
            # The semaphore bounds requests; a limit on connections would count waiting for one as the server's time.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
            # Servers set no cookies, and looking for some takes time in every request.
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Content-Type": "application/json"},
            )

    async def close(self) -> None:
        """Closes the session. Safe to call twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def generate(self, body: dict[str, Any], read: Callable[[Any], Answer]) -> Answer:
        """Posts `body` to /generate of some server, with retries on others or the same.

        Args:
            body: the request.
            read: turns the answer into what is wanted, or raises RequestFailed.

        Raises:
            RequestFailed: the last attempt's failure.
        """
        payload = json.dumps(body).encode()
        avoid: set[str] = set()
        config = self.config
        async with self._slots:
            for attempt in range(config.attempts - 1):
                try:
                    return await self._try(payload, read, avoid)
                except RequestFailed as failure:
                    if not failure.transient:
                        raise
                self.num_retries += 1
                backoff = min(config.backoff_s * 2**attempt, config.longest_backoff_s)
                await asyncio.sleep(backoff + random.uniform(0.0, config.backoff_s))
            return await self._try(payload, read, avoid)

    async def ask(
        self, endpoint: Endpoint, path: str, body: dict[str, Any] | None = None, timeout_s: float = CONTROL_TIMEOUT_S
    ) -> Any:
        """One request to one server, without retries: GET without `body`, POST with one; the parsed JSON, or the text.

        Raises:
            RequestFailed: it did not answer with success.
        """
        payload = None if body is None else json.dumps(body).encode()
        return await self._send(endpoint, path, payload, timeout_s)

    async def info(self, endpoint: Endpoint, path: str) -> dict[str, Any]:
        """What a server says of itself: /model_info or /server_info, also where an older SGLang has the older names.

        Raises:
            RequestFailed: it did not answer, or is no SGLang.
        """
        try:
            answer = await self.ask(endpoint, path)
        except RequestFailed as error:
            if "answered 404" not in error.detail:
                raise
            answer = await self.ask(endpoint, path.replace("/", "/get_"))
        if not isinstance(answer, dict):
            raise RequestFailed(ScoreStatus.misaligned, f"{endpoint.url}{path} is not SGLang's")
        return answer

    async def _try(self, payload: bytes, read: Callable[[Any], Answer], avoid: set[str]) -> Answer:
        endpoint = self.pool.pick(avoid)
        if endpoint is None:
            first = min(self.pool.endpoints, key=lambda resting: resting.rests_until)
            if self._repair is not None:
                await self._repair(first)
            assert first.failure is not None, "a server rests after a failure"
            # Counted as what it is a consequence of: an overloaded server must not look like a broken one.
            detail = f"every server is left alone for a while: {first.failure.detail}"
            raise RequestFailed(first.failure.status, detail, transient=True)
        try:
            with self.pool.busy(endpoint):
                answer = read(await self._send(endpoint, "/generate", payload, self.config.timeout_s))
        except RequestFailed as error:
            if error.transient:
                avoid.add(endpoint.url)
                self.pool.failed(endpoint, error, gone=isinstance(error.__cause__, aiohttp.ClientConnectorError))
                if self._repair is not None:
                    await self._repair(endpoint)
            else:
                self.pool.succeeded(endpoint)
            raise
        self.pool.succeeded(endpoint)
        return answer

    async def _send(self, endpoint: Endpoint, path: str, payload: bytes | None, timeout_s: float) -> Any:
        if self._session is None:
            raise OpdError("the SGLang client is not started, or is closed")
        url = endpoint.url + path
        try:
            async with self._session.request(
                "GET" if payload is None else "POST",
                url,
                data=payload,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                content = await response.read()
        except TimeoutError as error:
            detail = f"{url} did not answer within {timeout_s:g} s"
            raise RequestFailed(ScoreStatus.timeout, detail, transient=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise RequestFailed(ScoreStatus.http_error, f"{url}: {error}", transient=True) from error
        return _read(url, response.status, content)


def _read(url: str, status: int, content: bytes) -> Any:
    """The parsed answer; content that is no JSON counts as a failure unless it is plain text with success."""
    if status >= 500 or status == 429:
        raise RequestFailed(ScoreStatus.http_error, f"{url} answered {status}: {_excerpt(content)}", transient=True)
    if status >= 400:
        text = _excerpt(content)
        too_long = "context length" in text or "longer than" in text
        raise RequestFailed(
            ScoreStatus.too_long if too_long else ScoreStatus.refused, f"{url} answered {status}: {text}"
        )
    if not content.lstrip().startswith((b"{", b"[")):
        return content.decode(errors="replace")
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise RequestFailed(ScoreStatus.http_error, f"{url}: the JSON breaks off: {error}", transient=True) from error


def _excerpt(content: bytes, limit: int = 300) -> str:
    return content[:limit].decode(errors="replace")
