"""Halves the number of requests in one engine when its memory runs out, and finds the row that is too large by itself."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from engines.errors import Failure
from pipeline.executors.live.protocol import Departure
from pipeline.executors.live.recorder import LeasedRow

# So many rows in succession that do not fit alone, and at least as many as the engine gets at once, end the replica.
# Another one may have more memory.
ALONE_TO_END = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    again: bool  # the row is asked again
    halved_to: int | None = None  # the requests that enter at once from now on
    departure: Departure | None = None  # the worker ends


class MemoryLimit:
    """The number of requests that the engine gets at once.

    The requests that ran out of memory together halve it once, and are asked again. A row that does not fit alone fails,
    and the number is again what it was before this row halved it.
    """

    def __init__(self, concurrency: int, requests: int | None = None) -> None:
        """`concurrency` and `requests`: the most rows, and requests, in the engine. A request may have several rows."""
        self.requests = requests or concurrency
        self.limits = [concurrency]  # by round; a new round begins when the limit changes
        self.alone = 0  # rows in succession that did not fit alone

    @property
    def at_once(self) -> int:
        return self.limits[-1]

    @property
    def lowered_to(self) -> int:
        """As `at_once`, and no limit at all while memory has not run out."""
        return self.limits[-1] if len(self.limits) > 1 else sys.maxsize

    def enter(self, row: LeasedRow) -> None:
        """The row enters the engine."""
        row.round = len(self.limits) - 1

    def judge(self, row: LeasedRow, failure: Failure, inside: int) -> Verdict:
        """There was no memory for this row. `inside`: the rows in the engine, with it."""
        half = max(1, min(self.at_once, inside) // 2)
        if failure.type == "engine_crash":  # the engine must be loaded again, with fewer requests at once
            fewer = min(half, self.requests // 2)
            return Verdict(True, fewer, Departure(replaced=True, at_once=fewer)) if inside > 1 and fewer else Verdict(False)
        row.limit_before = row.limit_before or self.limits[row.round]
        if row.round < len(self.limits) - 1:  # another row of its round came first
            return Verdict(True)
        if failure.needs_room and inside > 1 and self.at_once > 1:
            self.limits.append(half)
            return Verdict(True, half)
        self.alone += 1
        too_small = self.alone >= max(ALONE_TO_END, self.at_once)
        if row.limit_before > self.at_once:
            self.limits.append(row.limit_before)
        return Verdict(False, departure=Departure(too_small=failure.message) if too_small else None)

    def note_answer(self, lowered_to: int | None) -> bool:
        """A row was answered. True if the engine itself now computes fewer requests at once."""
        self.alone = 0
        if lowered_to is None or lowered_to >= self.at_once:
            return False
        self.limits.append(lowered_to)
        return True
