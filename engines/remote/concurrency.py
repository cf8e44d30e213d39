"""Limits the requests in flight and picks their endpoints: AIMD slots, endpoint health, retry budget.

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
# The longest that a task waits for an endpoint, or for the retry budget, before it looks again.
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

    @property
    def room(self) -> int:
        """The number of requests that would get a slot at once."""
        return max(0, int(self.limit) - self.used - len(self.waiting))

    def take_now(self) -> bool:
        """Takes a slot if one is free."""
        with self.lock:
            return self._take_free()

    def _take_free(self) -> bool:
        """Takes a slot if one is free. The caller holds the lock."""
        if self.used >= int(self.limit) or self.waiting:
            return False
        self.used += 1
        return True

    async def take(self) -> None:
        with self.lock:
            if self._take_free():
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
        """Gives free slots to waiting tasks. The caller holds the lock, and wakes the tasks after it has released it."""
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
    wait_until: float = 0.0  # the server asked for no request before this time (monotonic)
    reached: bool = False  # a server at this URL has answered, even if with an error
    last_error: str = ""

    @property
    def open(self) -> bool:
        """True if the circuit is broken: the endpoint gets probes only."""
        return self.failures >= FAILURES_TO_OPEN


@dataclass(slots=True)
class Turn:
    """The right to send one request to an endpoint. `EndpointPool.release` must follow, whatever happens."""

    endpoint: Endpoint
    probe: bool = False  # this request tests if an endpoint with an open circuit works again


@dataclass
class EndpointPool:
    """All endpoints of one engine. The least busy healthy one is picked; a failing one is probed from time to time."""

    urls: list[str]
    all: list[Endpoint] = field(init=False)
    changed: PerLoop[asyncio.Event] = field(default_factory=lambda: PerLoop(asyncio.Event))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.all = [Endpoint(url) for url in self.urls]

    def pick(self) -> Turn | None:
        """A turn at the endpoint that the next request goes to; None if no endpoint takes one now."""
        now = time.monotonic()
        best = None
        with self.lock:
            for endpoint in self.all:
                if endpoint.open:
                    if endpoint.probing or now < endpoint.probe_at:
                        continue
                    endpoint.probing = True
                    endpoint.outstanding += 1
                    return Turn(endpoint, probe=True)
                if best is None or endpoint.outstanding < best.outstanding:
                    best = endpoint
            if best is None:
                return None
            best.outstanding += 1
        return Turn(best)

    def release(self, turn: Turn) -> None:
        """Ends a request, whatever its result. After a probe without a result, another probe may start."""
        with self.lock:
            turn.endpoint.outstanding -= 1
            self._end_probe(turn)

    def _end_probe(self, turn: Turn) -> None:
        """Ends the probe if this turn is one. The caller holds the lock."""
        if turn.probe:
            turn.endpoint.probing = turn.probe = False

    async def wait(self) -> None:
        """Returns when an endpoint may take a request, or after `LOOK_S`."""
        with self.lock:
            soonest = min((e.probe_at for e in self.all if e.open and not e.probing), default=None)
        left = LOOK_S if soonest is None else max(0.0, soonest - time.monotonic())
        changed = self.changed.get()
        changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), min(left, LOOK_S) + 0.001)

    def answered(self, turn: Turn) -> None:
        """The server answered, even if only to refuse a row."""
        endpoint = turn.endpoint
        endpoint.reached = True
        if not endpoint.failures:
            return
        with self.lock:
            endpoint.failures, endpoint.failing_since, endpoint.wait_until = 0, None, 0.0
            endpoint.probe_wait_s = PROBE_FIRST_S
            self._end_probe(turn)
        self.changed.call(asyncio.Event.set)

    def failed(self, turn: Turn, error: str, wait_s: float = 0.0) -> None:
        """The request failed. `wait_s`: the server asked for no request for so many seconds."""
        now, endpoint = time.monotonic(), turn.endpoint
        with self.lock:
            endpoint.last_error = error
            endpoint.failures += 1
            endpoint.failing_since = endpoint.failing_since or now
            endpoint.wait_until = max(endpoint.wait_until, now + wait_s)
            if endpoint.failures == FAILURES_TO_OPEN or turn.probe:
                endpoint.probe_at = now + max(wait_s, endpoint.probe_wait_s * random.uniform(0.8, 1.2))
                endpoint.probe_wait_s = min(PROBE_MOST_S, 2 * endpoint.probe_wait_s)
            self._end_probe(turn)
        self.changed.call(asyncio.Event.set)

    @property
    def reached(self) -> bool:
        """True if a server has answered at one of the URLs."""
        return any(endpoint.reached for endpoint in self.all)

    @property
    def trouble(self) -> str:
        """The last error, if no endpoint takes requests now; empty if one does."""
        now = time.monotonic()
        stalled = all(endpoint.open or endpoint.wait_until > now for endpoint in self.all)
        return self.all[0].last_error if stalled else ""

    @property
    def silent_s(self) -> float:
        """Seconds since all endpoints have only failed. 0 if one of them has answered last."""
        if not all(endpoint.failures for endpoint in self.all):
            return 0.0
        return time.monotonic() - max(endpoint.failing_since or 0.0 for endpoint in self.all)

    @property
    def down_s(self) -> float:
        """Seconds for which the circuits of all endpoints are open. 0 if one endpoint takes requests."""
        return self.silent_s if all(endpoint.open for endpoint in self.all) else 0.0


class RetryBudget:
    """Retries are a share of the answered requests, so that a failing server is not flooded.

    A retry that is answered gives its token back: rows that were refused together come back as fast as the server answers.
    """

    def __init__(self, share: float = 0.2, least_per_s: float = 1.0, maximum: float = 100.0) -> None:
        self.share, self.least_per_s, self.maximum = share, least_per_s, maximum
        self.tokens, self.at = maximum / 2, time.monotonic()
        self.lock = threading.Lock()

    def answered(self, retried: bool) -> None:
        """A request was answered; `retried`: it was a retry."""
        if self.tokens >= self.maximum:
            return
        with self.lock:
            self.tokens = min(self.maximum, self.tokens + self.share + retried)

    def take(self) -> float:
        """Takes one retry and returns 0. If there is none, returns the seconds until there is one; it may come sooner."""
        with self.lock:
            now = time.monotonic()
            self.tokens = min(self.maximum, self.tokens + (now - self.at) * self.least_per_s)
            self.at = now
            if self.tokens < 1:
                return (1 - self.tokens) / self.least_per_s
            self.tokens -= 1
            return 0.0
