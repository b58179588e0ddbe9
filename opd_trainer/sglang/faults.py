"""Failures that the fake server produces when told to."""

import asyncio
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import Any

from aiohttp import web

DRIP_BYTES = 16
"""A dripping answer sends this many bytes, then waits."""


class Fault(StrEnum):
    """What goes wrong with a request to /generate."""

    delay = auto()
    """The answer comes `seconds` late."""
    error_500 = auto()
    """Internal server error."""
    reset = auto()
    """The connection breaks before an answer."""
    cut = auto()
    """The connection breaks in the middle of the JSON."""
    drip = auto()
    """The answer comes a few bytes every `seconds`."""
    truncated = auto()
    """The list of log-probs is one too short."""
    wrong_length = auto()
    """The list of log-probs is one too long."""
    shifted = auto()
    """The log-probs are those of other tokens."""
    null = auto()
    """A log-prob is null."""
    nan = auto()
    """A log-prob is NaN."""
    refused = auto()
    """400, for no good reason."""


@dataclass(slots=True)
class Faults:
    """Faults of the next requests to /generate, one each, in order; None lets one pass unharmed."""

    queue: deque[tuple[Fault | None, float]] = field(default_factory=deque)
    every: tuple[Fault, float] | None = None

    def add(self, fault: Fault | None, times: int = 1, seconds: float = 0.0) -> None:
        """The next `times` requests suffer `fault`."""
        self.queue.extend([(fault, seconds)] * times)

    def next(self) -> tuple[Fault | None, float]:
        """The fault of the request that just came, with its seconds."""
        return self.queue.popleft() if self.queue else (self.every or (None, 0.0))


async def respond(
    request: web.Request, answer: Callable[[], Any], fault: Fault | None, seconds: float
) -> web.StreamResponse:
    """Answers with JSON, or as the fault has it."""
    match fault:
        case Fault.delay:
            await asyncio.sleep(seconds)
        case Fault.error_500:
            return web.Response(status=500, text="Internal Server Error")
        case Fault.refused:
            return web.json_response({"error": {"message": "no"}}, status=400)
        case Fault.reset:
            return hang_up(request)
        case _:
            pass
    content = json.dumps(spoil(answer(), fault)).encode()
    if fault is Fault.cut:
        return await _stream(request, [content[: len(content) // 2]], len(content), 0.0)
    if fault is Fault.drip:
        parts = [content[start : start + DRIP_BYTES] for start in range(0, len(content), DRIP_BYTES)]
        return await _stream(request, parts, len(content), seconds)
    return web.Response(body=content, content_type="application/json")


def spoil(answer: Any, fault: Fault | None) -> Any:
    """The answer with its log-probs made wrong; changed in place."""
    meta = answer["meta_info"]
    entries = meta.get("input_token_logprobs") or meta.get("output_token_logprobs")
    if not entries:
        return answer
    match fault:
        case Fault.truncated:
            entries.pop()
        case Fault.wrong_length:
            entries.append(list(entries[-1]))
        case Fault.shifted:
            for entry in entries:
                entry[1] += 1
        case Fault.null:
            entries[-1][0] = None
        case Fault.nan:
            entries[-1][0] = float("nan")
        case _:
            pass
    return answer


async def _stream(request: web.Request, parts: list[bytes], length: int, seconds: float) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(length)})
    await response.prepare(request)
    for part in parts:
        await response.write(part)
        await asyncio.sleep(seconds)
    if sum(map(len, parts)) < length:
        hang_up(request)
    return response


def hang_up(request: web.Request) -> web.Response:
    """Breaks the connection; the response goes nowhere."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
