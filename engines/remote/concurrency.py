"""How many requests are in flight, and where they go: AIMD slots, endpoint health, and the retry budget."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from dataclasses import dataclass, field

# So many failures in a row, with nothing answered between, and an endpoint is left alone but for probes.
FAILURES_TO_OPEN = 10
PROBE_FIRST_S, PROBE_MOST_S = 1.0, 30.0


class AdaptiveSemaphore:
    """Requests in flight: between 1 and `most`, additive increase, multiplicative decrease.

    Only overload (429, 503, 529) shrinks it, at most once for the requests that were in flight together. It grows by
    one for each answer up to half of where it last shrank, then by one for each round of answers (RFC 5681).
    """

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.limit = float(maximum)
        self.threshold = float(maximum)
        self.used = 0
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.shrunk_at = 0.0

    async def take(self) -> None:
        if self.used < int(self.limit) and not self.waiting:
            self.used += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()
            raise

    def release(self) -> None:
        self.used -= 1
        self._admit()

    def _admit(self) -> None:
        while self.waiting and self.used < int(self.limit):
            turn = self.waiting.popleft()
            if not turn.done():
                self.used += 1
                turn.set_result(None)

    def answered(self) -> None:
        if self.limit < self.maximum:
            self.limit = min(self.maximum, self.limit + (1.0 if self.limit < self.threshold else 1.0 / self.limit))
            self._admit()

    def overloaded(self, sent_at: float) -> None:
        """A request sent at `sent_at` (monotonic) met overload."""
        if sent_at >= self.shrunk_at:
            self.shrunk_at = time.monotonic()
            self.limit = self.threshold = max(1.0, self.limit / 2)


@dataclass(slots=True)
class Endpoint:
    """One URL and how it fares."""

    url: str
    outstanding: int = 0
    failures: int = 0  # in a row
    failing_since: float | None = None
    probe_at: float = 0.0
    probe_wait_s: float = PROBE_FIRST_S
    probing: bool = False
    last_error: str = ""

    @property
    def open(self) -> bool:
        """Whether the circuit is broken: nothing but probes goes there."""
        return self.failures >= FAILURES_TO_OPEN


@dataclass
class EndpointPool:
    """All endpoints of one engine: the least busy healthy one is picked; a sick one is probed every so often."""

    urls: list[str]
    all: list[Endpoint] = field(init=False)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.all = [Endpoint(url) for url in self.urls]

    def pick(self) -> Endpoint | None:
        """Where the next request goes, counted as outstanding; None while there is nowhere."""
        now = time.monotonic()
        best = None
        for endpoint in self.all:
            if endpoint.open:
                if endpoint.probing or now < endpoint.probe_at:
                    continue
                endpoint.probing = True
                best = endpoint
                break
            if best is None or endpoint.outstanding < best.outstanding:
                best = endpoint
        if best is not None:
            best.outstanding += 1
        return best

    async def wait(self) -> None:
        """Until there may be somewhere to send to."""
        soonest = min((e.probe_at for e in self.all if e.open and not e.probing), default=None)
        left = 1.0 if soonest is None else max(0.0, soonest - time.monotonic())
        self.changed.clear()
        try:
            await asyncio.wait_for(self.changed.wait(), min(left, 1.0) + 0.001)
        except TimeoutError:
            pass

    def answered(self, endpoint: Endpoint) -> None:
        """The server did its work, be it to refuse a row."""
        if endpoint.failures:
            endpoint.failures, endpoint.failing_since, endpoint.probing = 0, None, False
            endpoint.probe_wait_s = PROBE_FIRST_S
            self.changed.set()

    def failed(self, endpoint: Endpoint, error: str, retry_after: float | None) -> None:
        endpoint.last_error = error
        now = time.monotonic()
        endpoint.failures += 1
        endpoint.failing_since = endpoint.failing_since or now
        was_probe, endpoint.probing = endpoint.probing, False
        if endpoint.failures == FAILURES_TO_OPEN or was_probe:
            endpoint.probe_at = now + max(retry_after or 0.0, endpoint.probe_wait_s * random.uniform(0.8, 1.2))
            endpoint.probe_wait_s = min(PROBE_MOST_S, 2 * endpoint.probe_wait_s)
        self.changed.set()

    @property
    def down_s(self) -> float:
        """For how long no endpoint has answered; 0 while one does."""
        if not all(endpoint.open for endpoint in self.all):
            return 0.0
        return time.monotonic() - max(endpoint.failing_since or 0.0 for endpoint in self.all)


class RetryBudget:
    """Retries are a share of the requests that are answered, so that a sick server is not hammered."""

    def __init__(self, share: float = 0.2, least_per_s: float = 1.0, maximum: float = 100.0) -> None:
        self.share, self.least_per_s, self.maximum = share, least_per_s, maximum
        self.tokens, self.at = maximum / 2, time.monotonic()

    def answered(self) -> None:
        self.tokens = min(self.maximum, self.tokens + self.share)

    def wait_s(self) -> float:
        """Takes one retry; how long until it may be made."""
        now = time.monotonic()
        self.tokens = min(self.maximum, self.tokens + (now - self.at) * self.least_per_s)
        self.at = now
        self.tokens -= 1
        return max(0.0, -self.tokens / self.least_per_s)
