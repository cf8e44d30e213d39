"""The measured speed of each worker, and the part of the remaining rows that it may hold so that all workers end together.

Plain Python: no Ray, no asyncio.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# The weight of a measurement falls to a third while the engine is filled this number of times, and in no fewer rows than
# this: so a speed that changes is noticed, and rows that take minutes are measured as well as those that take milliseconds.
MEMORY_FILLS, MEMORY_ROWS = 16, 64
# A worker gets no further row if the others would answer it this many times sooner. Measured times vary.
SLACK = 1.25
# Speeds are computed anew after this number of seconds for each worker, so that hundreds of workers cost no more than few.
FRESH_S = 0.001


@dataclass(slots=True)
class Pace:
    """The speed of one worker, measured since its first answer. Older measurements count less."""

    done: int  # rows that it has answered
    busy: int  # rows in its engine
    at: float  # the time of the last measurement
    rows: float = 0.0
    seconds: float = 0.0
    row_seconds: float = 0.0  # sum of the times that rows were in the engine

    def note(self, done: int, busy: int, now: float) -> None:
        span, more = now - self.at, done - self.done
        kept = math.exp(-more / max(MEMORY_ROWS, MEMORY_FILLS * self.busy))
        if self.busy or more:  # a worker without rows is not slow
            self.seconds += span
            self.row_seconds += span * max(1, self.busy)
        self.rows = (self.rows + more) * kept
        self.seconds, self.row_seconds = self.seconds * kept, self.row_seconds * kept
        self.done, self.busy, self.at = done, busy, now

    def speed(self, now: float) -> float:
        """Rows per second. It falls while a worker with rows answers none."""
        return self.rows / (self.seconds + self._silence(now))

    def latency(self, now: float) -> float:
        """The mean seconds of a row in the engine, by Little's law."""
        return (self.row_seconds + self._silence(now) * self.busy) / self.rows

    def _silence(self, now: float) -> float:
        return now - self.at if self.busy else 0.0


@dataclass(frozen=True, slots=True)
class _Measured:
    """Computed at one moment for all workers whose speed is known."""

    at: float
    speeds: dict[str, float]
    latency: dict[str, float]
    speed: float  # of all of them
    least_latency: float


class Paces:
    """The measured speeds of all workers."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.of: dict[str, Pace] = {}  # worker -> its speed; only workers that have answered a row
        self.last: _Measured | None = None

    def note(self, worker: str, done: int, busy: int) -> None:
        """`worker` has answered `done` rows in all, and has `busy` rows in its engine."""
        found = self.of.get(worker)
        if found is not None:
            found.note(done, busy, self.clock())
        elif done:
            self.of[worker] = Pace(done, busy, self.clock())

    def leave(self, worker: str) -> None:
        self.of.pop(worker, None)
        self.last = None

    def share(self, worker: str, held: Mapping[str, int], waiting: int, ends: bool) -> int:
        """The most rows that `worker` may hold.

        `held` are the rows of each worker, `waiting` those of no worker. `ends`: no other rows will come. The part follows
        the measured speed. A worker that has no speed yet counts as an average one.
        """
        known = self._measured()
        speeds, latency = known.speeds, known.latency
        usual = known.speed / len(speeds) if speeds else 1.0
        rows, speed = waiting + sum(held.values()), known.speed + usual * (len(held) - len(speeds))
        in_time = math.inf
        if ends and worker in speeds:
            most = SLACK * max(rows / speed, known.least_latency)
            if latency[worker] > most:  # a row would end last here
                return 0
            in_time = max(1, math.floor(most * speeds[worker]))
            late = [name for name, seconds in latency.items() if seconds > most]
            rows -= sum(held.get(name, 0) for name in late)
            speed -= sum(speeds[name] for name in late)
        return int(min(math.ceil(rows * speeds.get(worker, usual) / speed), in_time))

    def _measured(self) -> _Measured:
        now = self.clock()
        if self.last is None or now - self.last.at > FRESH_S * len(self.of):
            known = {name: pace for name, pace in self.of.items() if pace.rows > 0 and pace.seconds > 0}
            speeds = {name: pace.speed(now) for name, pace in known.items()}
            latency = {name: pace.latency(now) for name, pace in known.items()}
            self.last = _Measured(now, speeds, latency, sum(speeds.values()), min(latency.values(), default=0.0))
        return self.last
