"""The controls that the pipeline has over an engine that asks a server: `engine.remote`, None for local engines."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from engines.config import SourceOf
from engines.types import Request

# Called after a failed try that may have to be paid, with its cost in US$ (None: not known). Returns True if the budget has
# room for another try.
CheckBudget = Callable[[Request, float | None], Awaitable[bool]]


class RemoteControls(Protocol):
    """Limits, outages, budget and draining of a remote engine."""

    @property
    def counts(self) -> Mapping[str, float]:
        """For metrics: `retried`, `throttled`, `limiter_wait_seconds`."""

    @property
    def url(self) -> str:
        """The address of the requests, without secrets."""

    @property
    def admitted(self) -> float | None:
        """The number of requests that may be in flight now; it follows the server's load. None if there is no limit."""

    @property
    def room(self) -> int:
        """The number of further requests that would be in flight at once. A request beyond it waits for another one."""

    @property
    def stall_reason(self) -> str:
        """The reason why no request is being answered now; empty if some are."""

    @property
    def outage(self) -> str | None:
        """Set once no server has answered for longer than the run may wait. Rows then fail for no fault of their own."""

    def attach(self, source_of: SourceOf, max_outage_s: float) -> None:
        """Sets the source of the whole cluster's limits, and the longest wait for a server that does not answer."""

    def set_budget(self, check: CheckBudget) -> None:
        """Sets the function that is asked before a paid request is tried again."""

    def notify_of_room(self, notify: Callable[[], None]) -> None:
        """Sets the function that is called if there is room before a row has its result: its request waits for a retry."""

    def drain(self) -> None:
        """Ends requests that only wait (for a retry, or for a limit) as `cancelled`; those in flight go on."""


class CombinedControls:
    """The controls of engines that are asked in order; None for those that are local."""

    def __init__(self, controls: Sequence[RemoteControls | None]) -> None:
        self.first, self.last = controls[0], controls[-1]
        self.all = [each for each in controls if each is not None]
        self.note_room: Callable[[], None] = lambda: None  # called if a request leaves an engine for the next one

    @property
    def counts(self) -> Mapping[str, float]:
        total: dict[str, float] = {}
        for each in self.all:
            for name, count in each.counts.items():
                total[name] = total.get(name, 0.0) + count
        return total

    @property
    def url(self) -> str:
        return (self.last or self.all[-1]).url

    @property
    def admitted(self) -> float | None:
        return self.first.admitted if self.first is not None else None

    @property
    def room(self) -> int:
        return self.first.room if self.first is not None else sys.maxsize

    @property
    def stall_reason(self) -> str:
        return self.first.stall_reason if self.first is not None else ""

    @property
    def outage(self) -> str | None:
        """Rows fail only once the last engine does not answer either."""
        return self.last.outage if self.last is not None else None

    def attach(self, source_of: SourceOf, max_outage_s: float) -> None:
        for each in self.all:
            each.attach(source_of, max_outage_s)

    def set_budget(self, check: CheckBudget) -> None:
        for each in self.all:
            each.set_budget(check)

    def notify_of_room(self, notify: Callable[[], None]) -> None:
        self.note_room = notify
        for each in self.all:
            each.notify_of_room(notify)

    def drain(self) -> None:
        for each in self.all:
            each.drain()
