"""How many requests are in flight and which endpoint gets them: AIMD slots, endpoint health, retry budget.

One engine owns these objects. An engine may be used from several threads and event loops at once, so all classes allow it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from engines.remote.event_loops import PerLoop, call_in

# After so many failures in a row, with no answer between, an endpoint gets probes only.
FAILURES_TO_OPEN = 10
PROBE_FIRST_S, PROBE_MOST_S = 1.0, 30.0
# The longest that a task waits for an endpoint before it looks again.
LOOK_S = 1.0


class Waiter:
    """A task that waits for a slot."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self.granted = False


class AdaptiveSemaphore:
    """Requests in flight: between 1 and `maximum`, additive increase, multiplicative decrease.

    Only overload (429, 503, 529) shrinks the limit, at most once for the requests that were in flight together. Each answer
    adds one up to half of where the limit last shrank; above that, each round of answers adds one (RFC 5681).
    """

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.limit = float(maximum)
        self.threshold = float(maximum)
        self.used = 0
        self.waiting: deque[Waiter] = deque()
        self.shrunk_at = 0.0
        self.lock = threading.Lock()

    async def take(self) -> None:
        with self.lock:
            if self.used < int(self.limit) and not self.waiting:
                self.used += 1
                return
            waiter = Waiter()
            self.waiting.append(waiter)
        try:
            await waiter.future
        except asyncio.CancelledError:
            with self.lock:
                granted = waiter.granted
                if not granted:
                    self.waiting.remove(waiter)
            if granted:
                self.release()
            raise

    def release(self) -> None:
        with self.lock:
            self.used -= 1
            granted = self._grant()
        self._wake(granted)

    def answered(self) -> None:
        if self.limit >= self.maximum:
            return
        with self.lock:
            self.limit = min(self.maximum, self.limit + (1.0 if self.limit < self.threshold else 1.0 / self.limit))
            granted = self._grant()
        self._wake(granted)

    def overloaded(self, sent_at: float) -> None:
        """A request sent at `sent_at` (monotonic seconds) met overload."""
        with self.lock:
            if sent_at >= self.shrunk_at:
                self.shrunk_at = time.monotonic()
                self.limit = self.threshold = max(1.0, self.limit / 2)

    def _grant(self) -> list[Waiter]:
        """Gives free slots to those who wait; the lock is held. They are woken after the lock is released."""
        granted = []
        while self.waiting and self.used < int(self.limit):
            waiter = self.waiting.popleft()
            waiter.granted = True
            self.used += 1
            granted.append(waiter)
        return granted

    def _wake(self, granted: list[Waiter]) -> None:
        for waiter in granted:
            if not call_in(waiter.loop, _finish, waiter.future):
                self.release()  # its loop ended without cancelling it


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@dataclass(slots=True)
class Endpoint:
    """One URL and its state."""

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
        """True if the circuit is broken: the endpoint gets probes only."""
        return self.failures >= FAILURES_TO_OPEN


@dataclass
class EndpointPool:
    """All endpoints of one engine. The least busy healthy one is picked; a failing one is probed from time to time."""

    urls: list[str]
    all: list[Endpoint] = field(init=False)
    changed: PerLoop[asyncio.Event] = field(default_factory=lambda: PerLoop(asyncio.Event))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.all = [Endpoint(url) for url in self.urls]

    def pick(self) -> Endpoint | None:
        """Where the next request goes, counted as outstanding; None if no endpoint takes one now."""
        now = time.monotonic()
        best = None
        with self.lock:
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

    def release(self, endpoint: Endpoint) -> None:
        """The request that `pick` counted has ended, with or without an answer."""
        with self.lock:
            endpoint.outstanding -= 1

    async def wait(self) -> None:
        """Returns when an endpoint may take a request, or after `LOOK_S`."""
        with self.lock:
            soonest = min((e.probe_at for e in self.all if e.open and not e.probing), default=None)
        left = LOOK_S if soonest is None else max(0.0, soonest - time.monotonic())
        changed = self.changed.get()
        changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), min(left, LOOK_S) + 0.001)

    def answered(self, endpoint: Endpoint) -> None:
        """The server answered, even if only to refuse a row."""
        if not endpoint.failures:
            return
        with self.lock:
            endpoint.failures, endpoint.failing_since, endpoint.probing = 0, None, False
            endpoint.probe_wait_s = PROBE_FIRST_S
        self.changed.call(asyncio.Event.set)

    def failed(self, endpoint: Endpoint, error: str, retry_after: float | None) -> None:
        now = time.monotonic()
        with self.lock:
            endpoint.last_error = error
            endpoint.failures += 1
            endpoint.failing_since = endpoint.failing_since or now
            was_probe, endpoint.probing = endpoint.probing, False
            if endpoint.failures == FAILURES_TO_OPEN or was_probe:
                endpoint.probe_at = now + max(retry_after or 0.0, endpoint.probe_wait_s * random.uniform(0.8, 1.2))
                endpoint.probe_wait_s = min(PROBE_MOST_S, 2 * endpoint.probe_wait_s)
        self.changed.call(asyncio.Event.set)

    @property
    def down_s(self) -> float:
        """For how many seconds no endpoint has answered; 0 if one does."""
        if not all(endpoint.open for endpoint in self.all):
            return 0.0
        return time.monotonic() - max(endpoint.failing_since or 0.0 for endpoint in self.all)


class RetryBudget:
    """Retries are a share of the answered requests, so that a failing server is not flooded."""

    def __init__(self, share: float = 0.2, least_per_s: float = 1.0, maximum: float = 100.0) -> None:
        self.share, self.least_per_s, self.maximum = share, least_per_s, maximum
        self.tokens, self.at = maximum / 2, time.monotonic()
        self.lock = threading.Lock()

    def answered(self) -> None:
        with self.lock:
            self.tokens = min(self.maximum, self.tokens + self.share)

    def wait_s(self) -> float:
        """Takes one retry and returns the seconds to wait before it."""
        with self.lock:
            now = time.monotonic()
            self.tokens = min(self.maximum, self.tokens + (now - self.at) * self.least_per_s)
            self.at = now
            self.tokens -= 1
            return max(0.0, -self.tokens / self.least_per_s)
