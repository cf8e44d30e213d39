"""Requests and tokens per minute: reserved before sending, corrected after the answer.

`RateLimiter` is the arithmetic, one for each key and model. It lives in this process if an engine is used alone, and in one
Ray actor for a whole cluster (`pipeline/executors/live/rate_limiter.py`). `Limits` is the engine's side: requests wait in
it until they may be sent, and are granted in small portions. An engine may be used from several threads at once: each
event loop has its own queues, the limits are shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from engines.config import EngineConfig
from engines.remote.event_loops import PerLoop

DIMENSIONS = ("requests", "input_tokens", "output_tokens")

# A request that is sent up to this many seconds late does not lower the rate. To stay below the limit, the rate is reduced
# twice by this slack: once for late requests, once for the delay between grant and arrival.
SLACK_S = 0.5
# The time for which requests may go without asking if nothing is limited. A pause reaches every worker within this time.
FREE_S = 0.5
# Grants in one portion, and the least time between two questions if there is a wait (`SLACK_S` makes up for lateness).
PORTION = 256
PORTION_S = 0.02


@dataclass(slots=True)
class Reservation:
    granted: int  # how many of the requests, in their order, may be sent
    wait_s: float = 0.0  # until the next one can be granted
    free_s: float = 0.0  # nothing is limited: for this long, send without asking


@dataclass(slots=True)
class Rate:
    """One limit as a generic cell rate algorithm (ITU-T I.371): smooth, without a burst when a new minute begins.

    In any 60 s at most (60 + SLACK_S) / interval + 1 units start; `interval` is chosen so that this is the limit.
    """

    per_minute: float
    due: float  # when the next unit is due if no request is ever late

    @property
    def interval(self) -> float:
        return (60.0 + 2 * SLACK_S) / self.per_minute * 1.000001

    def wait(self, now: float) -> float:
        return self.due - SLACK_S - now

    def take(self, units: float, now: float) -> None:
        self.due = max(self.due, now) + units * self.interval

    def give_back(self, units: float) -> None:
        """Returns units that were reserved and not used. A negative number was used beyond the reservation."""
        self.due -= units * self.interval


class RateLimiter:
    """The limits of one key and one model. Not thread-safe. `clock` returns monotonic seconds."""

    def __init__(self, per_minute: dict[str, float | None], clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        # Due one slack from now: a limiter that replaces a lost one allows no second burst.
        self.rates = {
            name: Rate(limit, clock() + SLACK_S) for name in DIMENSIONS if (limit := per_minute.get(name)) is not None
        }
        self.paused_until = 0.0

    def reserve(self, costs: list[tuple[float, float]], back: tuple[float, float] = (0.0, 0.0)) -> Reservation:
        """Reserves for as many of `costs` as the limits allow, in their order.

        `costs` has the input and output tokens of each request. `back` has the tokens reserved earlier and not used.
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
        """Grants nothing for `seconds`, because the provider asked for it."""
        self.paused_until = max(self.paused_until, self.clock() + seconds)

    def learn(self, limits: dict[str, float]) -> None:
        """Takes over limits from the provider's headers if they are lower than those that are set."""
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
    """The limiters of one key, one for each model. Not thread-safe."""

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
    """One question to the limiter: requests to grant, and news since the last question."""

    costs: list[tuple[float, float]] = field(default_factory=list)
    back: tuple[float, float] = (0.0, 0.0)
    pause_s: float = 0.0
    learned: dict[str, float] = field(default_factory=dict)


Reserve = Callable[[str, ReserveRequest], Awaitable[Reservation]]


class ModelState:
    """The state of one model, which all event loops of an engine share."""

    def __init__(self) -> None:
        self.next = ReserveRequest()  # the next question to the limiter
        self.news = False  # the next question must be asked before anything is sent
        self.free_until = 0.0


class WaitQueue:
    """Requests of one event loop that wait to be sent to one model, first come first served."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[tuple[float, float], asyncio.Future[None]]] = deque()
        self.task: asyncio.Task[None] | None = None
        self.news = asyncio.Event()

    def fail(self, error: Exception) -> None:
        while self.waiting:
            _, turn = self.waiting.popleft()
            if not turn.done():
                turn.set_exception(error)


def _fail_all(queues: dict[str, WaitQueue], make_error: Callable[[], Exception]) -> None:
    for queue in queues.values():
        queue.fail(make_error())


class Limits:
    """An engine's side of the limits: `take` before sending, `settle` after the answer. Thread-safe."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.counts_tokens = bool(config.input_tokens_per_minute or config.output_tokens_per_minute)
        self.lock = threading.Lock()
        own = RateLimiters(per_minute(config))

        async def local(model: str, request: ReserveRequest) -> Reservation:
            with self.lock:
                return own.reserve(model, request)

        self.source: Reserve = local
        self.models: dict[str, ModelState] = {}
        self.queues: PerLoop[dict[str, WaitQueue]] = PerLoop(dict)

    def is_free(self, model: str) -> bool:
        """True if the limiter said that requests need not ask it at this time."""
        state = self.models.get(model)
        return state is not None and not state.news and time.monotonic() < state.free_until

    async def take(self, model: str, cost: tuple[float, float]) -> None:
        """Waits until a request with so many input and output tokens may be sent."""
        queues = self.queues.get()
        queue = queues.get(model)
        if queue is None:
            queue = queues[model] = WaitQueue()
            self.models.setdefault(model, ModelState())
        state = self.models[model]
        if not queue.waiting and self.is_free(model):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.waiting.append((cost, turn))
        if queue.task is None or queue.task.done():
            queue.task = asyncio.create_task(self._serve(model, queue, state))
        await turn

    async def _serve(self, model: str, queue: WaitQueue, state: ModelState) -> None:
        """Asks for those that wait, one portion at a time, until none is left."""
        try:
            while queue.waiting:
                queue.news.clear()
                with self.lock:
                    request, state.next, state.news = state.next, ReserveRequest(), False
                request.costs = [cost for cost, _ in list(queue.waiting)[:PORTION]]
                reservation = await self.source(model, request)
                for _ in range(min(reservation.granted, len(queue.waiting))):
                    _, turn = queue.waiting.popleft()
                    if not turn.done():
                        turn.set_result(None)
                if reservation.free_s:
                    state.free_until = time.monotonic() + reservation.free_s
                elif reservation.wait_s > 0 and queue.waiting:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(queue.news.wait(), min(max(reservation.wait_s, PORTION_S), 1.0))
        except Exception as error:
            queue.fail(error)

    def fail_waiting(self, make_error: Callable[[], Exception]) -> None:
        """Ends all waiting, in every event loop, with an error."""
        self.queues.call(lambda queues: _fail_all(queues, make_error))

    def settle(self, model: str, input: float, output: float) -> None:
        """Returns reserved tokens that were not used (negative: more were used). The next question tells the limiter."""
        if (state := self.models.get(model)) is not None:
            with self.lock:
                back = state.next.back
                state.next.back = (back[0] + input, back[1] + output)

    def observe(self, model: str, pause_s: float, learned: dict[str, float]) -> None:
        """Takes note of what a response says about the limits. Nothing is sent before the limiter knows of it."""
        state = self.models.get(model)
        if state is None:
            return
        with self.lock:
            known = all(state.next.learned.get(name) == limit for name, limit in learned.items())
            state.next.pause_s = max(state.next.pause_s, pause_s)
            state.next.learned.update(learned)
            state.news = state.news or bool(pause_s) or not known
        self.counts_tokens |= "input_tokens" in learned or "output_tokens" in learned
        if (pause_s or not known) and (queue := self.queues.get().get(model)) is not None:
            queue.news.set()  # other loops look at least once a second
