"""Requests and tokens a minute: reserved before sending, reconciled after.

`Budget` is the arithmetic, one per key and model. It lives in this process when an engine is used alone, and in one
Ray actor for a whole cluster (`pipeline/executors/live/rate_limiter.py`). `Limits` is the engine's side: requests that
want to be sent wait in it, and are granted in small portions.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from engines.config import EngineConfig

DIMENSIONS = ("requests", "input_tokens", "output_tokens")

# Sends may come this much later than planned and still be made up for, in seconds; what that could add to any minute
# is taken off the rate, and as much again for the way between a grant and the server.
SLACK_S = 0.5
# How long a grant without limits is good for: within it, a pause reaches every worker.
FREE_S = 0.5
# Grants in one portion, and the least time between two questions when there is a wait: lateness is made up for.
PORTION = 256
PORTION_S = 0.02


@dataclass(slots=True)
class Reservation:
    granted: int  # of those that asked, the first so many may be sent
    wait_s: float = 0.0  # before it is worth asking for the next
    free_s: float = 0.0  # nothing is limited: send without asking for so long


@dataclass(slots=True)
class Rate:
    """One limit as a generic cell rate algorithm (ITU-T I.371): smooth, with no burst at the minute's turn.

    In any 60 s, at most (60 + SLACK_S) / interval + 1 units start; `interval` is such that this is the limit.
    """

    per_minute: float
    due: float  # when the next unit is due, were nobody ever late

    @property
    def interval(self) -> float:
        return (60.0 + 2 * SLACK_S) / self.per_minute * 1.000001

    def wait(self, now: float) -> float:
        return self.due - SLACK_S - now

    def take(self, units: float, now: float) -> None:
        self.due = max(self.due, now) + units * self.interval

    def give_back(self, units: float) -> None:
        """Units that were reserved and not used; negative ones were used beyond what was reserved."""
        self.due -= units * self.interval


class RateLimiter:
    """What may be sent with one key to one model. Not thread-safe; `now` is a monotonic clock in seconds."""

    def __init__(self, per_minute: dict[str, float | None], clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        # Due one slack from now: a budget that was lost with its process and made anew allows no second burst.
        self.rates = {
            name: Rate(limit, clock() + SLACK_S) for name in DIMENSIONS if (limit := per_minute.get(name)) is not None
        }
        self.paused_until = 0.0

    def reserve(self, costs: list[tuple[float, float]], back: tuple[float, float] = (0.0, 0.0)) -> Reservation:
        """Reserves for the first of `costs` (input and output tokens of each request) as far as the limits allow.

        `back` are the input and output tokens reserved earlier and not used.
        """
        for name, units in zip(DIMENSIONS[1:], back, strict=True):
            if units and name in self.rates:
                self.rates[name].give_back(units)
        now = self.clock()
        if now < self.paused_until:
            return Reservation(0, self.paused_until - now)
        if not self.rates:
            return Reservation(len(costs), free_s=FREE_S)
        for at, cost in enumerate(costs):
            wait = max(rate.wait(now) for rate in self.rates.values())
            if wait > 0:
                return Reservation(at, wait)
            for name, rate in self.rates.items():
                rate.take(1.0 if name == "requests" else cost[DIMENSIONS.index(name) - 1], now)
        return Reservation(len(costs))

    def pause(self, seconds: float) -> None:
        """Nothing more for so long: the provider asked for it."""
        self.paused_until = max(self.paused_until, self.clock() + seconds)

    def learn(self, limits: dict[str, float]) -> None:
        """Limits the provider's headers tell; a lower one than what is set counts."""
        for name, limit in limits.items():
            rate = self.rates.get(name)
            if rate is None:
                self.rates[name] = Rate(limit, self.clock() + SLACK_S)
            elif limit < rate.per_minute:
                rate.per_minute = limit


def per_minute(config: EngineConfig) -> dict[str, float | None]:
    return {
        "requests": config.requests_per_minute,
        "input_tokens": config.input_tokens_per_minute,
        "output_tokens": config.output_tokens_per_minute,
    }


class RateLimiters:
    """The budgets of one key, by model."""

    def __init__(self, limits: dict[str, float | None]) -> None:
        self.limits = limits
        self.by_model: dict[str, RateLimiter] = {}

    def _of(self, model: str) -> RateLimiter:
        if model not in self.by_model:
            self.by_model[model] = RateLimiter(self.limits)
        return self.by_model[model]

    def reserve(self, model: str, request: ReserveRequest) -> Reservation:
        limiter = self._of(model)
        if request.pause_s:
            limiter.pause(request.pause_s)
        if request.learned:
            limiter.learn(request.learned)
        return limiter.reserve(request.costs, request.back)


@dataclass(slots=True)
class ReserveRequest:
    """One question of a worker to the budget."""

    costs: list[tuple[float, float]] = field(default_factory=list)
    back: tuple[float, float] = (0.0, 0.0)
    pause_s: float = 0.0
    learned: dict[str, float] = field(default_factory=dict)


Reserve = Callable[[str, ReserveRequest], Awaitable[Reservation]]


class WaitQueue:
    """Those who wait to send to one model, first come first served."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[tuple[float, float], asyncio.Future[None]]] = deque()
        self.next = ReserveRequest()
        self.free_until = 0.0
        self.task: asyncio.Task[None] | None = None
        self.news = asyncio.Event()


class Limits:
    """An engine's side of the budgets: `take` before sending, `settle` after."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.counts_tokens = bool(config.input_tokens_per_minute or config.output_tokens_per_minute)
        own = RateLimiters(per_minute(config))

        async def local(model: str, request: ReserveRequest) -> Reservation:
            return own.reserve(model, request)

        self.source: Reserve = local
        self.queues: dict[str, WaitQueue] = {}

    async def take(self, model: str, cost: tuple[float, float]) -> None:
        """Waits until a request of so many input and output tokens may be sent."""
        queue = self.queues.get(model)
        if queue is None:
            queue = self.queues[model] = WaitQueue()
        if not queue.waiting and time.monotonic() < queue.free_until and not queue.news.is_set():
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.waiting.append((cost, turn))
        if queue.task is None or queue.task.done():
            queue.task = asyncio.create_task(self._serve(model, queue))
        await turn

    async def _serve(self, model: str, queue: WaitQueue) -> None:
        """Asks for those who wait, one portion at a time, until nobody does."""
        try:
            while queue.waiting:
                request, queue.next = queue.next, ReserveRequest()
                queue.news.clear()
                request.costs = [cost for cost, _ in list(queue.waiting)[:PORTION]]
                reservation = await self.source(model, request)
                for _ in range(min(reservation.granted, len(queue.waiting))):
                    _, turn = queue.waiting.popleft()
                    if not turn.done():
                        turn.set_result(None)
                if reservation.free_s:
                    queue.free_until = time.monotonic() + reservation.free_s
                elif reservation.wait_s > 0 and queue.waiting:
                    try:
                        await asyncio.wait_for(queue.news.wait(), min(max(reservation.wait_s, PORTION_S), 1.0))
                    except TimeoutError:
                        pass
        except Exception as error:
            self.fail_waiting(error)

    def fail_waiting(self, error: Exception) -> None:
        """Ends the waiting of all who wait, with this error."""
        for queue in self.queues.values():
            while queue.waiting:
                _, turn = queue.waiting.popleft()
                if not turn.done():
                    turn.set_exception(error)

    def settle(self, model: str, input: float, output: float) -> None:
        """So many reserved tokens were not used (negative: more were); told with the next question."""
        if queue := self.queues.get(model):
            back = queue.next.back
            queue.next.back = (back[0] + input, back[1] + output)

    def observe(self, model: str, pause_s: float, learned: dict[str, float]) -> None:
        """What a response said about the limits; the next request waits for the answer to it."""
        queue = self.queues.get(model)
        if queue is None:
            return
        known = all(queue.next.learned.get(name) == limit for name, limit in learned.items())
        queue.next.pause_s = max(queue.next.pause_s, pause_s)
        queue.next.learned.update(learned)
        self.counts_tokens |= "input_tokens" in learned or "output_tokens" in learned
        if pause_s or not known:
            queue.news.set()
