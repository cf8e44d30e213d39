"""Sends the requests of one engine until each is answered or has failed for good: slots, endpoints, limits, retries.

A request takes a slot, an endpoint and its share of the rate limits for each try; retries are a loop around that.
"""

from __future__ import annotations

import asyncio
import datetime
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence

from engines.config import EngineConfig, SourceOf
from engines.errors import EngineError, forget_frames
from engines.remote.concurrency import LOOK_S, AdaptiveSemaphore, Endpoint, EndpointPool, RetryBudget, Turn
from engines.remote.controls import CheckBudget
from engines.remote.errors import OVERLOAD
from engines.remote.event_loops import PerLoop
from engines.remote.preflight import shown_url
from engines.remote.rate_limits import Limits
from engines.types import BYTES_PER_TOKEN, FIRST_OUTPUT, Completion, Request
from engines.usage import Usage

# Full jitter: each wait is drawn between 0 and a bound that doubles with every try.
BACKOFF_FIRST_S, BACKOFF_MOST_S = 0.5, 60.0
# The longest that one answer's Retry-After stops all other rows; its own row waits as long as it says.
MOST_PAUSE_S = 60.0
# A longer wait that a server asks for is named beside its error.
LONG_WAIT_S = 5.0
# If no server has ever answered at the URL, it is probably misspelt: the run stops after this time.
UNREACHED_S = 45.0

# Sends one request to an endpoint and reads the answer. Raises `EngineError`.
Ask = Callable[[Endpoint], Awaitable[Completion]]


class RequestSender:
    """The `RemoteControls` of one engine. It may be used from several threads and event loops."""

    def __init__(
        self,
        config: EngineConfig,
        endpoints: EndpointPool,
        max_concurrency: int,
        cost: Callable[[Usage, str | None], float | None],
    ) -> None:
        self.config, self.endpoints, self.max_concurrency, self.cost = config, endpoints, max_concurrency, cost
        self.limits = Limits(config)
        self.semaphore = AdaptiveSemaphore(max_concurrency)
        self.retries = RetryBudget()
        self.check_budget: CheckBudget | None = None
        self.on_room: Callable[[], None] | None = None
        self.max_outage_s = 900.0  # the longest time without an answer from any server
        self.outage: str | None = None
        self.stopping = False
        self.stops: PerLoop[asyncio.Event] = PerLoop(asyncio.Event)
        self.counts: dict[str, float] = {"retried": 0, "throttled": 0, "limiter_wait_seconds": 0.0}
        self.counting = threading.Lock()
        # Estimates for the next request's reservation. Threads may overwrite each other's updates: that does no harm.
        self.bytes_per_token, self.mean_output = BYTES_PER_TOKEN, FIRST_OUTPUT

    # -- for the pipeline: `RemoteControls` ---------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return shown_url(self.endpoints.urls[0])

    @property
    def admitted(self) -> float:
        return self.semaphore.limit

    @property
    def room(self) -> int:
        return self.semaphore.room

    @property
    def stall_reason(self) -> str:
        trouble = self.endpoints.trouble
        return f"{trouble}. Without an answer the run stops after {_duration(self.patience_s)}" if trouble else ""

    @property
    def patience_s(self) -> float:
        """The longest time without an answer from any server, in seconds."""
        return self.max_outage_s if self.endpoints.reached else min(self.max_outage_s, UNREACHED_S)

    def attach(self, source_of: SourceOf, max_outage_s: float) -> None:
        self.limits.source = source_of(self.config)
        self.max_outage_s = max_outage_s

    def set_budget(self, check: CheckBudget) -> None:
        self.check_budget = check

    def notify_of_room(self, notify: Callable[[], None]) -> None:
        self.on_room = notify

    def drain(self) -> None:
        self.stopping = True
        self.stops.call(asyncio.Event.set)
        self.limits.fail_waiting(cancelled)

    def _count(self, name: str, amount: float = 1) -> None:
        with self.counting:
            self.counts[name] += amount

    # -- one request --------------------------------------------------------------------------------------------------

    async def send(
        self, rows: Sequence[Request], model: str, size: int, ask: Ask, output: float | None = None
    ) -> Completion:
        """The answer to one request of `size` bytes, with one row or several.

        `output` are the output tokens to reserve; None: those of a chat. Raises the `EngineError` of the last try, with the
        usage of all.
        """
        if output is None:
            output = float(rows[0].generation.max_tokens or self.mean_output)
        cost = size / self.bytes_per_token, output
        began, tries, counted = time.monotonic(), 0, 0
        failed: Usage | None = None  # of the tries before
        failing_since: float | None = None
        while True:
            tries += 1
            try:
                completion = await self._try(model, cost, ask, retried=tries > 1)
                completion.attempts = tries
                if failed is not None:
                    completion.usage.add(failed)
                completion.queued_s = max(0.0, time.monotonic() - began - completion.latency_s)
                return completion
            except EngineError as error:
                failed = failed or Usage()
                failing_since = failing_since or time.monotonic()
                tries -= error.type == "cancelled"  # it was not sent
                await self._raise_if_final(rows, error, tries, failed)
                # A row's tries count only while the server answers others. A rate limit is not the row's fault. But a row
                # must also end if it is refused for a long time while others are answered.
                counted += not self.endpoints.down_s and error.type != "rate_limit"
                if counted > self.config.max_retries or time.monotonic() - failing_since > 2 * self.max_outage_s:
                    if error.type == "connection" and not self.endpoints.reached:
                        error.scope = "run"
                    raise
                self._count("retried")
                if self.on_room is not None:
                    self.on_room()
                forget_frames(error)
                wait = random.uniform(0, min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2 ** min(tries, 16)))
                if await self._stops_within(max(wait, self._asked_wait(error))) or not await self._may_retry():
                    back = cancelled()
                    back.attempts, back.usage = tries, failed
                    raise back from None

    async def _raise_if_final(self, rows: Sequence[Request], error: EngineError, tries: int, failed: Usage) -> None:
        """Raises `error` if the request must not be tried again, whatever the number of tries.

        `failed` is the usage of all failed tries; the usage of this one is added to it.
        """
        affordable = True
        if error.usage is None and error.type in ("timeout", "bad_response"):
            error.usage = Usage(known=False)
        if error.usage is not None:
            failed.add(error.usage)
            if self.check_budget is not None:
                for row, usage in zip(rows, error.usage.divided([input_size(row) for row in rows]), strict=True):
                    affordable = await self.check_budget(row, self.cost(usage, row.model)) and affordable
        error.attempts, error.usage = tries, failed
        if not error.retryable or (rows[0].stream is not None and rows[0].stream.begun):
            raise error
        if not affordable:
            text = f"run.budget_usd leaves no room for another try ({error})"
            spent = EngineError("budget", text, retryable=True)
            spent.attempts, spent.usage = tries, failed
            raise spent from None
        # Tries that meet a rate limit are not counted, so the circuit may stay closed: here any failure counts.
        silent = self.endpoints.silent_s if error.type == "rate_limit" else self.endpoints.down_s
        if silent > self.patience_s:
            never = "" if self.endpoints.reached else "; no server has ever answered there: check engine.base_url"
            self.outage = f"engine={self.config.kind} has not answered for {silent:.0f} s at {self.url} ({error}){never}"
            raise error

    def _asked_wait(self, error: EngineError) -> float:
        """The seconds that the server asks this row to wait; at most as long as the run waits for an answer."""
        return min(error.retry_after or 0.0, self.patience_s)

    async def _may_retry(self) -> bool:
        """Waits until the retry budget has a retry. False: the run ends."""
        while wait := self.retries.take():
            if await self._stops_within(min(wait, LOOK_S) * random.uniform(0.5, 1.5)):  # not all look at once
                return False
        return True

    async def _stops_within(self, seconds: float) -> bool:
        """Waits without a slot. Returns True as soon as the run ends: the row then goes back."""
        stop = self.stops.get()
        if not self.stopping:
            try:
                await asyncio.wait_for(stop.wait(), seconds)
            except TimeoutError:
                return False
        return True

    async def _try(self, model: str, cost: tuple[float, float], ask: Ask, retried: bool) -> Completion:
        """One try, in a slot; `retried`: not the first of its request. Raises `EngineError`."""
        turn = self._admit_now() or await self._admitted()
        sent = time.monotonic()
        try:
            if not self.stopping and not self.limits.is_free(model):
                await self.limits.take(model, cost)
                self._count("limiter_wait_seconds", time.monotonic() - sent)
            if self.stopping:
                raise cancelled()
            sent = time.monotonic()
            completion = await ask(turn.endpoint)
            completion.latency_s = time.monotonic() - sent
            self.endpoints.answered(turn)
        except EngineError as error:
            self._failed(turn, model, error, sent, retried)
            if error.type not in ("timeout", "connection", "cancelled"):  # for those, the usage is not known
                self.limits.settle(model, *cost)
            raise
        finally:
            self.endpoints.release(turn)
            self.semaphore.release()
        self.semaphore.answered()
        self.retries.answered(retried)
        if self.limits.counts_tokens and (used := completion.usage).input:
            self.limits.settle(model, cost[0] - used.input, cost[1] - used.output)
            self.bytes_per_token += 0.05 * (cost[0] * self.bytes_per_token / used.input - self.bytes_per_token)
            if completion.choices:  # a chat
                self.mean_output += 0.05 * (used.output - self.mean_output)
        return completion

    def _admit_now(self) -> Turn | None:
        """A turn if a slot is free and an endpoint takes requests."""
        if not self.semaphore.take_now():
            return None
        if (turn := self.endpoints.pick()) is None:
            self.semaphore.release()
        return turn

    async def _admitted(self) -> Turn:
        """Waits for a slot and an endpoint. Holds no slot while no endpoint takes requests."""
        while True:
            await self.semaphore.take()
            turn = self.endpoints.pick()
            if turn is not None:
                return turn
            self.semaphore.release()
            if self.stopping:
                raise cancelled()
            if self.endpoints.down_s > self.patience_s:
                raise EngineError("connection", self.endpoints.all[0].last_error, retryable=True)
            await self.endpoints.wait()

    def _failed(self, turn: Turn, model: str, error: EngineError, sent: float, retried: bool) -> None:
        if error.type == "cancelled":
            return
        if error.status in OVERLOAD:
            self._count("throttled")
            self.semaphore.overloaded(sent)
            if error.retry_after:
                self.limits.observe(model, min(self._asked_wait(error), MOST_PAUSE_S), {})
        if error.type == "timeout" or (error.status is not None and error.status >= 400):  # a server took the request
            turn.endpoint.reached = True
        # An answer with its usage comes from a server that works: a broken one counts against its row only.
        if error.retryable and not (error.usage is not None and error.usage.known):
            asked = error.retry_after or 0.0
            more = f". The server asks for a wait of {_duration(asked)}" if asked > LONG_WAIT_S else ""
            self.endpoints.failed(turn, f"{error}{more}", self._asked_wait(error))
        else:  # the server works; it refuses this row
            self.endpoints.answered(turn)
            self.retries.answered(retried)


def input_size(row: Request) -> int:
    """The characters of a row's input, by which the tokens of a request with several rows are divided."""
    return sum(len(value) if isinstance(value, str) else sum(map(len, value)) for value in row.inputs.values())


def cancelled() -> EngineError:
    """The error of a row that goes back unanswered because the run ends."""
    return EngineError("cancelled", "the run ended before this row was answered")


def _duration(seconds: float) -> str:
    """`0:15:00`, `1 day, 0:00:00`."""
    return str(datetime.timedelta(seconds=round(min(seconds, 1e9))))
