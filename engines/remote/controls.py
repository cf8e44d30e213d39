"""What the pipeline asks of an engine that sends its requests to a server: `engine.remote`, None for local engines."""

from __future__ import annotations

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
    def admitted(self) -> float | None:
        """How many requests may be in flight now; it follows the server's load. None if nothing bounds them."""

    @property
    def stall_reason(self) -> str:
        """Why no request is being answered now; empty if some are."""

    @property
    def outage(self) -> str | None:
        """Set once no server has answered for longer than the run may wait. Rows then fail for no fault of their own."""

    def attach(self, source_of: SourceOf, max_outage_s: float) -> None:
        """Sets where the limits of the whole cluster are kept, and how long to wait for a server that does not answer."""

    def set_budget(self, check: CheckBudget) -> None:
        """Sets the function that is asked before a paid request is tried again."""

    def drain(self) -> None:
        """Ends requests that only wait (for a retry, or for a limit) as `cancelled`; those in flight go on."""


class CombinedControls:
    """The controls of engines that are asked in order; None for those that are local."""

    def __init__(self, controls: Sequence[RemoteControls | None]) -> None:
        self.first, self.last = controls[0], controls[-1]
        self.all = [each for each in controls if each is not None]

    @property
    def counts(self) -> Mapping[str, float]:
        total: dict[str, float] = {}
        for each in self.all:
            for name, count in each.counts.items():
                total[name] = total.get(name, 0.0) + count
        return total

    @property
    def admitted(self) -> float | None:
        return self.first.admitted if self.first is not None else None

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

    def drain(self) -> None:
        for each in self.all:
            each.drain()
