"""Collects rows that arrive concurrently into HTTP requests with several texts, and gives each row its own answer.

- A request is sent as soon as it is full. One that is not full is sent when no further row arrives. While a request waits
  for a place or for a rate limit, the rows behind it are collected until a request is full.
- A request that the server refuses because of what is in it is sent again in two halves, so that a bad text fails alone. If
  all of its parts are answered, it was only too large: later requests are smaller.
- The usage of a request is divided among its rows by the length of their inputs; the sums are exact.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from engines.errors import EngineError
from engines.remote.task_formats import RowAnswer
from engines.remote.task_options import TaskOptions
from engines.types import Completion, Request
from engines.usage import Usage

# A request that is not full is sent after so long without a new row, and after the maximum at the latest.
QUIET_S = 0.002
FIRST_S, BUSY_S = 0.005, 0.1  # the maximum if nothing is in flight, and if something is
# The time between two looks while a request waits to be sent.
UNSENT_LOOK_S = 0.01
# Until answers show the real ratio. Text in few languages has fewer bytes a token.
FIRST_BYTES_PER_TOKEN = 3.0
# The part of the provider's limit of tokens that is used: the sizes in tokens are estimates.
TOKEN_MARGIN = 0.9

# Errors of a request that one of its texts may have caused.
BY_TEXT = frozenset(("invalid_input", "bad_request", "context_length", "content_filter", "bad_response"))
# Errors that are retried, but that one text may cause again and again: a server that fails on it, or takes too long.
BY_TEXT_AFTER_RETRIES = frozenset(("server", "timeout"))

# Sends one request for the rows. The function it is given must be called when the request is really sent. Returns the
# completion of the whole request and the answer of each row. Raises `EngineError`.
Send = Callable[[Sequence[Request], Callable[[], None]], Awaitable[tuple[Completion, Sequence[RowAnswer]]]]


class RequestLimits:
    """The largest request of one kind: as the provider says, or less if the server refuses that. Shared by threads."""

    def __init__(self, options: TaskOptions) -> None:
        self.texts, self.tokens = options.texts, options.tokens
        self.most_bytes = float("inf")
        self.bytes_per_token = FIRST_BYTES_PER_TOKEN

    @property
    def bytes(self) -> float:
        if self.tokens is None:
            return self.most_bytes
        return min(self.most_bytes, TOKEN_MARGIN * self.bytes_per_token * self.tokens)

    def answered(self, size: int, tokens: int) -> None:
        if tokens:
            self.bytes_per_token += 0.2 * (size / tokens - self.bytes_per_token)

    def too_large(self, texts: int, size: int) -> None:
        """A request was refused, and its halves of up to this size were answered."""
        self.texts, self.most_bytes = max(1, min(self.texts, texts)), min(self.most_bytes, size)


class Row:
    __slots__ = ("answer", "request", "sending", "since", "size")

    def __init__(self, request: Request, since: float, answer: asyncio.Future[Completion]) -> None:
        self.request, self.since, self.answer = request, since, answer
        self.size = 0  # of its input, in bytes
        for value in request.inputs.values():
            self.size += _bytes(value)
        self.sending: Sending | None = None


class Sending:
    """A request under way: its task, and the number of its rows that somebody still waits for."""

    def __init__(self, task: asyncio.Task[None], rows: int) -> None:
        self.task, self.rows = task, rows


class TextBatcher:
    """The rows of one kind (task, model, parameters) in one event loop."""

    def __init__(self, send: Send, limits: RequestLimits) -> None:
        self.send, self.limits = send, limits
        self.rows: list[Row] = []  # of the next request
        self.bytes = self.seen = 0  # of these rows; the number of rows at the last look
        self.most_bytes = limits.bytes  # of the next request
        self.unsent = 0  # requests that wait for a place or for a rate limit
        self.under_way: set[asyncio.Task[None]] = set()
        self.timer: asyncio.TimerHandle | None = None
        self.loop = asyncio.get_running_loop()

    async def evaluate(self, request: Request) -> Completion:
        """The answer to one row. Raises `EngineError`."""
        row = Row(request, self.loop.time(), self.loop.create_future())
        if self.rows and self.bytes + row.size > self.most_bytes:
            self._dispatch()
        self.rows.append(row)
        self.bytes += row.size
        if len(self.rows) >= self.limits.texts:
            self._dispatch()
        elif self.timer is None:
            self.timer = self.loop.call_later(QUIET_S, self._look)
        try:
            return await row.answer
        except asyncio.CancelledError:
            if row.sending is not None:
                row.sending.rows -= 1
                if not row.sending.rows:
                    row.sending.task.cancel()
            raise

    def _look(self) -> None:
        """Sends the collected rows, or looks again later."""
        self.timer, grew, self.seen = None, len(self.rows) != self.seen, len(self.rows)
        if not self.rows:
            return
        longest = BUSY_S if self.under_way else FIRST_S
        if self.unsent:
            self.timer = self.loop.call_later(UNSENT_LOOK_S, self._look)
        elif grew and self.loop.time() - self.rows[0].since < longest:
            self.timer = self.loop.call_later(QUIET_S, self._look)
        else:
            self._dispatch()

    def _dispatch(self) -> None:
        rows = [row for row in self.rows if not row.answer.done()]  # the others were cancelled
        self.rows, self.bytes, self.seen, self.most_bytes = [], 0, 0, self.limits.bytes
        if not rows:
            return
        task = self.loop.create_task(self._answer(rows))
        sending = Sending(task, len(rows))
        for row in rows:
            row.sending = sending
        self.under_way.add(task)
        task.add_done_callback(self.under_way.discard)

    async def _answer(self, rows: list[Row]) -> None:
        try:
            results = await self._ask(rows)
        except BaseException as error:  # a bug, or the end of the event loop
            for row in rows:
                if not row.answer.done():
                    row.answer.cancel() if isinstance(error, asyncio.CancelledError) else row.answer.set_exception(error)
            raise
        for row, result in zip(rows, results, strict=True):
            if row.answer.done():
                continue
            if isinstance(result, EngineError):
                row.answer.set_exception(result)
            else:
                row.answer.set_result(result)

    async def _ask(self, rows: list[Row]) -> list[Completion | EngineError]:
        """The results of the rows, in their order."""
        began, waits, weights = self.loop.time(), True, [row.size for row in rows]
        self.unsent += 1

        def sent() -> None:
            nonlocal waits
            self.unsent -= waits
            waits = False

        try:
            whole, answers = await self.send([row.request for row in rows], sent)
        except EngineError as error:
            parts = (error.usage or Usage()).divided(weights)
            if len(rows) == 1 or not _may_be_a_text(error):
                return [_copied(error, usage) for usage in parts]
            sent()
            return await self._ask_halves(rows, error, parts)
        finally:
            sent()
        await asyncio.sleep(0)  # the next request, which has the free place now, is sent first
        self.limits.answered(sum(weights), whole.usage.input)
        results: list[Completion | EngineError] = []
        for row, answer, usage in zip(rows, answers, whole.usage.divided(weights), strict=True):
            if isinstance(answer, EngineError):
                answer.usage, answer.attempts = usage, whole.attempts
                results.append(answer)
                continue
            completion = Completion(usage=usage, model=whole.model, attempts=whole.attempts, values=answer)
            completion.latency_s, completion.queued_s = whole.latency_s, (whole.queued_s or 0.0) + began - row.since
            results.append(completion)
        return results

    async def _ask_halves(self, rows: list[Row], error: EngineError, parts: list[Usage]) -> list[Completion | EngineError]:
        """Asks again for the rows of a request that failed with `error`, for which each row pays its part."""
        middle = (len(rows) + 1) // 2
        halves = rows[:middle], rows[middle:]
        first, second = await asyncio.gather(*map(self._ask, halves))
        results = [*first, *second]
        if not any(isinstance(result, EngineError) for result in results):
            self.limits.too_large(middle, max(sum(row.size for row in half) for half in halves))
        for result, part in zip(results, parts, strict=True):
            result.attempts += error.attempts
            if result.usage is None:
                result.usage = part
            else:
                result.usage.add(part)
        return results


def _may_be_a_text(error: EngineError) -> bool:
    """True if one text of a request may be the reason for its error."""
    return error.scope == "row" and (error.type in BY_TEXT or error.type in BY_TEXT_AFTER_RETRIES)


def _copied(error: EngineError, usage: Usage) -> EngineError:
    """The error of a request as that of one of its rows."""
    copied = EngineError(
        error.type, str(error), status=error.status, retryable=error.retryable, code=error.given_code, key=error.key,
        scope=error.scope,
    )  # fmt: skip
    copied.attempts, copied.usage, copied.retry_after = error.attempts, usage, error.retry_after
    return copied


def _bytes(value: str | list[str]) -> int:
    """The bytes of a text, or of several, in UTF-8."""
    if isinstance(value, list):
        return sum(map(_bytes, value))
    return len(value) if value.isascii() else len(value.encode(errors="replace"))
