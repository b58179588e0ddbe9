"""Several servers that answer alike: who is asked next, who is left alone for a while, who is tried again."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field

from opd_trainer.sglang.failure import RequestFailed

STRIKES = 3
"""Timeouts or server errors in a row after which an endpoint counts as down; a refused connection suffices alone."""
REST_S = 1.0
LONGEST_REST_S = 15.0
"""A server that is down rests this long, twice as long after each failed try up to the second number."""


@dataclass(slots=True)
class Endpoint:
    """One server.

    Attributes:
        url: base URL without a trailing slash.
        in_flight: requests under way.
        strikes: failures in a row.
        rests_until: clock reading before which it is left alone; 0 while it is up.
        rest_s: length of its next rest.
        tried: a request finds out whether it is back.
        failure: the latest one.
        order: when it was picked last; ties go to the one picked longest ago.
    """

    url: str
    in_flight: int = 0
    strikes: int = 0
    rests_until: float = 0.0
    rest_s: float = REST_S
    tried: bool = False
    failure: RequestFailed | None = None
    order: int = 0

    @property
    def up(self) -> bool:
        """Whether the last tries succeeded."""
        return self.rests_until == 0.0


@dataclass(slots=True)
class Pool:
    """Picks a server that was down and has rested, for one request; otherwise the least busy one that is up."""

    endpoints: list[Endpoint]
    clock: Callable[[], float] = time.monotonic
    turns: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    def of(cls, urls: Sequence[str]) -> "Pool":
        """A pool of the servers at `urls` (see `base_url`)."""
        return cls([Endpoint(base_url(url)) for url in urls])

    def pick(self, avoid: Set[str] = frozenset()) -> Endpoint | None:
        """The next server to ask, None when all are down and resting.

        Args:
            avoid: URLs that just failed; one of them is picked only when there is no other.
        """
        now = self.clock()
        ready = [e for e in self.endpoints if e.up or e.rests_until <= now]
        chosen = min(ready, key=lambda e: (e.url in avoid, e.up, e.in_flight, e.order), default=None)
        if chosen is None:
            return None
        chosen.order = next(self.turns)
        if not chosen.up:
            # Until this try ends, others leave the server alone.
            chosen.rests_until, chosen.tried = now + chosen.rest_s, True
        return chosen

    @contextmanager
    def busy(self, endpoint: Endpoint) -> Iterator[None]:
        """Counts a request while it is under way."""
        endpoint.in_flight += 1
        try:
            yield
        finally:
            endpoint.in_flight -= 1

    def succeeded(self, endpoint: Endpoint) -> None:
        """The server answered."""
        endpoint.strikes, endpoint.rests_until, endpoint.rest_s, endpoint.tried = 0, 0.0, REST_S, False

    def failed(self, endpoint: Endpoint, failure: RequestFailed, *, gone: bool) -> None:
        """The server did not answer; `gone`: nobody listens there."""
        endpoint.failure = failure
        endpoint.strikes += 1
        # Of requests that fail together, as they do when a server dies, only the first lengthens the rest.
        news = endpoint.up or endpoint.tried
        if news and (gone or endpoint.strikes >= STRIKES):
            endpoint.rests_until, endpoint.tried = self.clock() + endpoint.rest_s, False
            endpoint.rest_s = min(2 * endpoint.rest_s, LONGEST_REST_S)


def base_url(url: str) -> str:
    """The URL without a trailing /generate or slash; http:// where no scheme is given."""
    trimmed = url.strip().rstrip("/").removesuffix("/generate").rstrip("/")
    return trimmed if "://" in trimmed else f"http://{trimmed}"
