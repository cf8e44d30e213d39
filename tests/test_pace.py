"""Rows leased by measured speed: simulated workers of unequal speed share rows so that all of them end together.

The lease table is real. Time is simulated, so the figures are the same on every machine.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from pipeline.executors.live.admission import Admission
from pipeline.executors.live.crash_trial import CrashTrial
from pipeline.executors.live.lease_table import LeaseTable
from pipeline.executors.live.pace import Pace, Paces
from pipeline.executors.live.queue import PrefixQueue
from pipeline.executors.requests import PendingRequest

POLL_S = 0.1  # a worker that got no row asks again after this time


@dataclass
class Replica:
    """A simulated worker: like `Worker`, it holds up to two rows a slot."""

    name: str
    slots: int
    latency_s: float
    starts_at: float = 0.0
    waiting: list[tuple[int, int]] = field(default_factory=list)
    inside: int = 0
    done: int = 0
    completed: list[tuple[int, list[int]]] = field(default_factory=list)
    asks_again: bool = False

    @property
    def held(self) -> int:
        return len(self.waiting) + self.inside

    @property
    def speed(self) -> float:
        return self.slots / self.latency_s


class Fleet:
    """Runs `rows` on replicas, and counts the seconds and the rows of each."""

    def __init__(self, rows: int, *replicas: Replica, jitter: float = 0.0) -> None:
        self.now, self.random, self.jitter = 0.0, random.Random(7), jitter
        self.queue = PrefixQueue()
        self.queue.add(PendingRequest(f"{at}".encode(), f"{at}", b"", 0, 0) for at in range(rows))
        self.table = LeaseTable(self.queue, CrashTrial(), Admission(None, ""), Paces(lambda: self.now))
        self.replicas = replicas
        self.events: list[tuple[float, int, Replica, tuple[int, int] | None]] = []
        for replica in replicas:
            self.table.join(replica.name)
            self.after(replica.starts_at, replica, None)
        while self.events:
            self.now, _, replica, row = heapq.heappop(self.events)
            if row is None:
                replica.asks_again = False
            else:
                replica.inside -= 1
                replica.done += 1
                replica.completed.append((row[0], [row[1]]))
            self.fill(replica)
            self.pull(replica)
            self.fill(replica)
        assert sum(replica.done for replica in replicas) == rows
        self.seconds = self.now

    def after(self, seconds: float, replica: Replica, row: tuple[int, int] | None) -> None:
        heapq.heappush(self.events, (self.now + seconds, self.random.getrandbits(60), replica, row))

    def pull(self, replica: Replica) -> None:
        window = 2 * replica.slots
        if replica.held > window - max(1, replica.slots // 2) or replica.asks_again:
            return
        self.table.paces.note(replica.name, replica.done, replica.inside)
        self.table.complete(replica.name, replica.completed)
        replica.completed = []
        lease = self.table.lend(replica.name, window - replica.held, replica.held, fed=True)
        if lease is not None:
            replica.waiting += [(lease.number, at) for at in range(len(lease))]
        elif self.table.waiting:
            replica.asks_again = True
            self.after(POLL_S, replica, None)

    def fill(self, replica: Replica) -> None:
        while replica.waiting and replica.inside < replica.slots:
            replica.inside += 1
            spread = 1 + self.jitter * (2 * self.random.random() - 1)
            self.after(replica.latency_s * spread, replica, replica.waiting.pop(0))


@pytest.mark.parametrize("slots", [4, 64])
@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_one_fast_and_three_slow_replicas_end_together(slots: int, jitter: float) -> None:
    replicas = [Replica("fast", slots, 0.5), *(Replica(f"slow{at}", slots, 2.0) for at in range(3))]
    rows = round(60 * sum(replica.speed for replica in replicas))  # a minute of work
    fleet = Fleet(rows, *replicas, jitter=jitter)
    assert fleet.seconds < 1.05 * 60
    assert replicas[0].done == pytest.approx(rows * 4 / 7, rel=0.05)


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_equal_replicas_get_equal_parts(slots: int) -> None:
    replicas = [Replica(f"w{at}", slots, 1.0) for at in range(4)]
    fleet = Fleet(30 * 4 * slots, *replicas, jitter=0.5)
    assert fleet.seconds < 30 * 1.05 + 1
    assert max(replica.done for replica in replicas) < 1.2 * min(replica.done for replica in replicas)


def test_a_slow_replica_gets_no_row_that_would_end_last() -> None:
    """Ten rows: the slow replica would need 100 s for one of them, and the fast one needs 10 s for all."""
    fast, slow = Replica("fast", 1, 1.0), Replica("slow", 1, 100.0)
    fleet = Fleet(1010, fast, slow)
    assert fleet.seconds <= 1010
    assert slow.done in (9, 10)


def test_a_replica_that_joins_late_gets_its_part() -> None:
    replicas = [Replica("fast", 8, 0.5), Replica("late", 8, 0.5, starts_at=10.0)]
    Fleet(800, *replicas)
    assert replicas[1].done == pytest.approx(320, rel=0.1)  # of the 640 rows that were left after 10 s


def test_a_replica_that_answers_nothing_any_more_loses_its_part() -> None:
    now = 0.0
    paces = Paces(lambda: now)
    for at in range(10):
        now = float(at)
        for name in ("good", "stuck"):
            paces.note(name, 8 * (at + 1), 8)
    held = {"good": 8, "stuck": 8}
    assert paces.share("good", held, 84, True) == 50
    for at in range(10, 200):
        now = float(at)
        paces.note("good", 8 * (at + 1), 8)
    assert paces.share("stuck", held, 84, False) < 10
    assert paces.share("good", held, 84, True) == 92  # all but the rows that the other one holds


def test_a_worker_that_waited_for_rows_is_not_slow() -> None:
    pace = Pace(0, 4, 0.0)
    pace.note(4, 0, 1.0)  # the engine is empty
    pace.note(4, 4, 100.0)
    pace.note(8, 4, 101.0)
    assert pace.speed(101.0) == pytest.approx(4.0)
    assert pace.latency(101.0) == pytest.approx(1.0)


def test_hundreds_of_workers_that_wait_for_rows_cost_little() -> None:
    """All of them ask each time when one has committed."""
    now = 0.0
    table = LeaseTable(queue := PrefixQueue(), CrashTrial(), Admission(None, ""), paces := Paces(lambda: now))
    names = [f"w{at}" for at in range(300)]
    for done in (1, 9):
        now += 1.0
        for name in names:
            table.join(name)
            paces.note(name, done, 8)
    assert [table.lend(name, 8, 0, True) for name in names] == [None] * 300
    assert paces.last is None  # without rows, nothing was computed
    queue.add(PendingRequest(f"{at}".encode(), f"{at}", b"", 0, 0) for at in range(300))
    assert table.lend(names[0], 8, 0, True) is not None
    measured = paces.last
    now += 0.2
    assert all(table.lend(name, 8, 0, True) for name in names[1:])
    assert paces.last is measured
    now += 0.2
    assert paces.share(names[0], table.lent_to, 0, True) == 1 and paces.last is not measured


def test_rows_of_a_lease_are_counted_for_their_worker_until_they_come_out() -> None:
    table = LeaseTable(queue := PrefixQueue(), CrashTrial(), Admission(None, ""))
    queue.add(PendingRequest(f"{at}".encode(), f"{at}", b"", 0, 0) for at in range(8))
    first, second = table.lend("w1", 3, 0, True), table.lend("w2", 2, 0, True)
    assert first is not None and second is not None
    assert table.lent_to == Counter(w1=3, w2=2) and table.lent == 5
    table.complete("w1", [(first.number, [0, 1])])
    table.commit("w1", [(first.number, [0, 2])])
    table.leave("w2", None, None)
    assert table.lent_to == Counter(w1=0) and table.lent == 0 and table.waiting == 5
