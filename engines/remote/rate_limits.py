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
class Grant:
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


class Budget:
    """What may be sent with one key to one model. Not thread-safe; `now` is a monotonic clock in seconds."""

    def __init__(self, per_minute: dict[str, float | None], clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        # Due one slack from now: a budget that was lost with its process and made anew allows no second burst.
        self.rates = {
            name: Rate(limit, clock() + SLACK_S) for name in DIMENSIONS if (limit := per_minute.get(name)) is not None
        }
        self.paused_until = 0.0

    def ask(self, costs: list[tuple[float, float]], back: tuple[float, float] = (0.0, 0.0)) -> Grant:
        """Reserves for the first of `costs` (input and output tokens of each request) as far as the limits allow.

        `back` are the input and output tokens reserved earlier and not used.
        """
        for name, units in zip(DIMENSIONS[1:], back, strict=True):
            if units and name in self.rates:
                self.rates[name].give_back(units)
        now = self.clock()
        if now < self.paused_until:
            return Grant(0, self.paused_until - now)
        if not self.rates:
            return Grant(len(costs), free_s=FREE_S)
        for at, cost in enumerate(costs):
            wait = max(rate.wait(now) for rate in self.rates.values())
            if wait > 0:
                return Grant(at, wait)
            for name, rate in self.rates.items():
                rate.take(1.0 if name == "requests" else cost[DIMENSIONS.index(name) - 1], now)
        return Grant(len(costs))

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


class Budgets:
    """The budgets of one key, by model."""

    def __init__(self, limits: dict[str, float | None]) -> None:
        self.limits = limits
        self.by_model: dict[str, Budget] = {}

    def _of(self, model: str) -> Budget:
        if model not in self.by_model:
            self.by_model[model] = Budget(self.limits)
        return self.by_model[model]

    def call(self, model: str, call: Call) -> Grant:
        budget = self._of(model)
        if call.pause_s:
            budget.pause(call.pause_s)
        if call.learned:
            budget.learn(call.learned)
        return budget.ask(call.costs, call.back)


@dataclass(slots=True)
class Call:
    """One question of a worker to the budget."""

    costs: list[tuple[float, float]] = field(default_factory=list)
    back: tuple[float, float] = (0.0, 0.0)
    pause_s: float = 0.0
    learned: dict[str, float] = field(default_factory=dict)


Source = Callable[[str, Call], Awaitable[Grant]]


class _Line:
    """Those who wait to send to one model, first come first served."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[tuple[float, float], asyncio.Future[None]]] = deque()
        self.next = Call()
        self.free_until = 0.0
        self.asker: asyncio.Task[None] | None = None
        self.news = asyncio.Event()


class Limits:
    """An engine's side of the budgets: `take` before sending, `settle` after."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.counts_tokens = bool(config.input_tokens_per_minute or config.output_tokens_per_minute)
        own = Budgets(per_minute(config))

        async def local(model: str, call: Call) -> Grant:
            return own.call(model, call)

        self.source: Source = local
        self.lines: dict[str, _Line] = {}

    async def take(self, model: str, cost: tuple[float, float]) -> None:
        """Waits until a request of so many input and output tokens may be sent."""
        line = self.lines.get(model)
        if line is None:
            line = self.lines[model] = _Line()
        if not line.waiting and time.monotonic() < line.free_until and not line.news.is_set():
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.waiting.append((cost, turn))
        if line.asker is None or line.asker.done():
            line.asker = asyncio.create_task(self._serve(model, line))
        await turn

    async def _serve(self, model: str, line: _Line) -> None:
        """Asks for those who wait, one portion at a time, until nobody does."""
        try:
            while line.waiting:
                call, line.next = line.next, Call()
                line.news.clear()
                call.costs = [cost for cost, _ in list(line.waiting)[:PORTION]]
                grant = await self.source(model, call)
                for _ in range(min(grant.granted, len(line.waiting))):
                    _, turn = line.waiting.popleft()
                    if not turn.done():
                        turn.set_result(None)
                if grant.free_s:
                    line.free_until = time.monotonic() + grant.free_s
                elif grant.wait_s > 0 and line.waiting:
                    try:
                        await asyncio.wait_for(line.news.wait(), min(max(grant.wait_s, PORTION_S), 1.0))
                    except TimeoutError:
                        pass
        except Exception as error:
            self.dismiss(error)

    def dismiss(self, error: Exception) -> None:
        """Ends the waiting of all who wait, with this error."""
        for line in self.lines.values():
            while line.waiting:
                _, turn = line.waiting.popleft()
                if not turn.done():
                    turn.set_exception(error)

    def settle(self, model: str, input: float, output: float) -> None:
        """So many reserved tokens were not used (negative: more were); told with the next question."""
        if line := self.lines.get(model):
            back = line.next.back
            line.next.back = (back[0] + input, back[1] + output)

    def tell(self, model: str, pause_s: float, learned: dict[str, float]) -> None:
        """What a response said about the limits; the next request waits for the answer to it."""
        line = self.lines.get(model)
        if line is None:
            return
        known = all(line.next.learned.get(name) == limit for name, limit in learned.items())
        line.next.pause_s = max(line.next.pause_s, pause_s)
        line.next.learned.update(learned)
        self.counts_tokens |= "input_tokens" in learned or "output_tokens" in learned
        if pause_s or not known:
            line.news.set()
