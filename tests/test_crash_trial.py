"""The lease table and the crash trial with simulated workers: each row ends once, and only poison rows are marked."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.executors.live.admission import Admission
from pipeline.executors.live.crash_trial import CrashTrial
from pipeline.executors.live.lease_table import LeaseTable
from pipeline.executors.live.protocol import Lease
from pipeline.executors.live.queue import PrefixQueue
from pipeline.executors.requests import PendingRequest

Row = tuple[int, int, str]  # lease, offset, name


@dataclass
class Process:
    """A simulated worker: as `pipeline.executors.live.worker.Worker`, it holds up to two rows a slot and admits them slot
    by slot."""

    name: str
    waiting: list[Row] = field(default_factory=list)
    inside: list[Row] = field(default_factory=list)
    completed: list[Row] = field(default_factory=list)  # since the last pull
    recorded: list[Row] = field(default_factory=list)  # since the last flush
    alone: bool = False
    ended: bool = False

    @property
    def held(self) -> int:
        return len(self.waiting) + len(self.inside)


@dataclass
class Mishaps:
    """What else may happen, and how often at most."""

    crashes: int = 0  # of processes with several rows inside, for no row's fault
    losses: int = 0  # of nodes
    drains: int = 0
    unreadable: bool = False  # journals cannot be read


class Cluster:
    """Runs all rows to their end. Time is a sequence of random events, drawn from `seed`."""

    def __init__(
        self, rows: int, poison: set[int], slots: int, workers: int, seed: int, mishaps: Mishaps | None = None
    ) -> None:
        self.names = [f"r{at}" for at in range(rows)]
        self.poison = {f"r{at}" for at in poison}
        self.slots, self.random, self.mishaps = slots, random.Random(seed), mishaps or Mishaps()
        self.queue, self.trial = PrefixQueue(), CrashTrial()
        self.table = LeaseTable(self.queue, self.trial, Admission(None, ""))
        self.queue.add(PendingRequest(name.encode(), name, b"", 0, 0) for name in self.names)
        self.numbers = itertools.count(1)
        self.workers = [self.new() for _ in range(workers)]
        self.answered: Counter[str] = Counter()
        self.marked: Counter[str] = Counter()
        self.deaths = self.most_in_a_row = self.lone_trials = 0
        self.stop_after = math.inf  # deaths in a row

    def new(self) -> Process:
        return Process(f"w{next(self.numbers)}")

    @property
    def stopped(self) -> bool:
        return self.trial.deaths_in_a_row > self.stop_after

    def run(self, *, full: bool = False, at_once: bool = False) -> Cluster:
        """`full`: engines admit all that they can before anything else happens. `at_once`: a poison row kills before any
        other row comes out."""
        for _ in range(10_000 + 2_000 * len(self.names)):
            if self.stopped or (not self.table.waiting and self.table.idle):
                return self
            worker = self.random.choice(self.workers)
            self.pull(worker)
            while worker.waiting and len(worker.inside) < self.slots and (full or self.random.random() < 0.8):
                worker.inside.append(worker.waiting.pop(0))
            if worker.inside and not self.mishap(worker):
                killers = [row for row in worker.inside if row[2] in self.poison] if at_once else []
                self.progress(worker, self.random.choice(killers or worker.inside))
            if self.random.random() < 0.1 or (worker.alone and not worker.held) or (not worker.ended and not worker.held):
                self.flush(worker)
        raise AssertionError("the run does not end")

    def pull(self, worker: Process) -> None:
        window = 2 * self.slots
        if (worker.alone and worker.held) or worker.held > window - max(1, self.slots // 2):
            return
        self.table.complete(worker.name, [(lease, [at]) for lease, at, _ in worker.completed])
        worker.completed = []
        self.table.join(worker.name)
        lease = self.table.lend(worker.name, window - worker.held, worker.held, fed=True)
        if lease is None:
            return
        rows = [(lease.number, at, name) for at, name in enumerate(lease.ids)]
        self.check(worker, lease)
        if lease.poison is not None:
            self.marked.update(lease.ids)
            worker.completed += rows
            worker.recorded += rows
            self.flush(worker)
            return
        worker.alone = lease.alone
        worker.waiting += rows
        self.lone_trials += lease.alone and len(rows) == 1

    def check(self, worker: Process, lease: Lease) -> None:
        holders = [other for other in self.workers for row in (*other.waiting, *other.inside) if row[2] in lease.ids]
        assert not holders, "a row is lent twice at a time"
        assert not lease.alone or not worker.held, "a trial is not alone"

    def progress(self, worker: Process, row: Row) -> None:
        if row[2] in self.poison:
            self.crash(worker)
            return
        worker.inside.remove(row)
        worker.completed.append(row)
        worker.recorded.append(row)

    def crash(self, worker: Process) -> None:
        self.deaths += 1
        inside = None if self.mishaps.unreadable else [(lease, at) for lease, at, _ in worker.inside]
        self.replace(worker, "killed", inside)
        self.most_in_a_row = max(self.most_in_a_row, self.trial.deaths_in_a_row)

    def replace(self, worker: Process, crash: str | None, inside: list[tuple[int, int]] | None) -> None:
        worker.ended = True
        self.table.leave(worker.name, crash, inside)
        self.workers[self.workers.index(worker)] = self.new()

    def mishap(self, worker: Process) -> bool:
        """Whether the worker ended for another reason than a poison row."""
        mishaps = self.mishaps
        if mishaps.crashes and len(worker.inside) > 1 and self.random.random() < 0.1:
            mishaps.crashes -= 1
            self.crash(worker)
        elif mishaps.losses and self.random.random() < 0.05:
            mishaps.losses -= 1
            self.replace(worker, None, None)
        elif mishaps.drains and self.random.random() < 0.05:  # it finishes what it can, and gives back the rest
            mishaps.drains -= 1
            for row in [row for row in worker.inside if row[2] not in self.poison]:
                self.progress(worker, row)
            self.flush(worker)
            self.replace(worker, None, [(lease, at) for lease, at, _ in worker.inside])
        return worker.ended

    def flush(self, worker: Process) -> None:
        if worker.ended or not worker.recorded:
            return
        names = [name for _, _, name in worker.recorded]
        self.answered.update(names)
        self.table.commit(worker.name, [(lease, [at]) for lease, at, _ in worker.recorded])
        if any(name not in self.marked for name in names):
            self.trial.finished()
        worker.recorded = []

    def verify(self) -> None:
        """Every row ended exactly once, the poison rows and only they as poison rows."""
        assert self.answered == Counter(self.names)
        assert set(self.marked) == self.poison
        assert self.table.lent == 0 and not self.trial.on_trial and not self.trial.recording


SEEDS = st.integers(0, 2**32)


@settings(max_examples=300)
@given(
    st.integers(1, 120), st.sets(st.integers(0, 119), max_size=8), st.integers(1, 40), st.integers(1, 4), SEEDS,
    st.builds(Mishaps, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.booleans()), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_every_row_ends_once_and_only_poison_rows_are_marked(
    rows: int, poison: set[int], slots: int, workers: int, seed: int, mishaps: Mishaps, full: bool, at_once: bool
) -> None:
    culprits = {at for at in poison if at < rows}
    chains = len(culprits) + mishaps.crashes
    others = mishaps.losses + mishaps.drains
    cluster = Cluster(rows, culprits, slots, workers, seed, mishaps).run(full=full, at_once=at_once)
    cluster.verify()
    suspects = min(rows, 2 * slots if mishaps.unreadable else slots)
    assert cluster.deaths <= chains * (2 + math.ceil(math.log2(suspects)))
    assert cluster.lone_trials <= 2 * chains + others


@settings(max_examples=100)
@given(st.integers(2, 200), st.integers(0, 199), st.integers(1, 64), SEEDS, st.booleans(), st.booleans())
def test_one_poison_row_never_stops_a_run(rows: int, at: int, slots: int, seed: int, full: bool, at_once: bool) -> None:
    cluster = Cluster(rows, {at % rows}, slots, 1, seed).run(full=full, at_once=at_once)
    cluster.verify()
    assert cluster.most_in_a_row <= 3 < 5  # the default of run.max_engine_deaths


@settings(max_examples=100)
@given(st.integers(6, 200), st.integers(1, 64), st.integers(1, 4), SEEDS, st.booleans())
def test_an_engine_that_dies_on_everything_marks_no_row(rows: int, slots: int, workers: int, seed: int, full: bool) -> None:
    cluster = Cluster(rows, set(range(rows)), slots, workers, seed)
    cluster.stop_after = 5
    cluster.run(full=full)
    assert cluster.stopped and cluster.deaths == 6
    assert not cluster.marked and not cluster.answered


@pytest.mark.parametrize("place", [0, 1, 2, 300, 511, 512, 767, 1023])
@pytest.mark.parametrize(("slots", "most_deaths"), [(1024, 11), (256, 9), (1, 2)])
def test_one_poison_row_among_1024_leased_rows(place: int, slots: int, most_deaths: int) -> None:
    """Every engine is full before the row kills it, and no other row comes out before."""
    cluster = Cluster(1024, {place}, slots, 1, seed=place)
    cluster.run(full=True, at_once=True)
    cluster.verify()
    assert 2 <= cluster.deaths <= most_deaths <= 12
    assert 1 <= cluster.lone_trials <= 2


def test_two_poison_rows_in_one_group_are_both_found() -> None:
    for first, second in itertools.combinations(range(0, 64, 5), 2):
        cluster = Cluster(300, {first, second}, 64, 1, seed=first).run(full=True, at_once=True)
        cluster.verify()
        assert cluster.deaths <= 2 * 8
        assert cluster.most_in_a_row <= 5


def rows_of(count: int) -> list[PendingRequest]:
    return [PendingRequest(f"r{at}".encode(), f"r{at}", b"", 0, 0) for at in range(count)]


def everything(rows: list[PendingRequest], want: int) -> tuple[list[PendingRequest], list[float], list[PendingRequest]]:
    return rows[:want], [], rows[want:]


def names(rows: list[PendingRequest]) -> list[str]:
    return [row.id for row in rows]


def test_rows_on_trial_that_did_not_reach_the_engine_are_cleared() -> None:
    trial = CrashTrial()
    trial.finished()
    rows = rows_of(8)
    trial.died("killed")
    trial.accuse(rows)
    chosen = trial.choose(everything)
    assert chosen is not None
    group, part, _ = chosen
    assert names(part) == ["r0", "r1", "r2", "r3"]
    trial.on_trial[1] = group
    trial.finished()  # another worker
    trial.died("killed")
    cleared = trial.end(1, part[:2], part[2:])
    assert names(cleared) == ["r2", "r3", "r4", "r5", "r6", "r7"]
    assert names(list(trial.suspects())) == ["r0", "r1"]


def test_a_lost_node_ends_no_trial_and_blames_nobody() -> None:
    trial = CrashTrial()
    trial.died("killed")
    trial.accuse(rows_of(4))
    chosen = trial.choose(everything)
    assert chosen is not None
    group, part, _ = chosen
    trial.on_trial[1] = group
    assert trial.end(1, [], part[1:]) == []  # the first one came out
    assert names(list(trial.suspects())) == ["r1", "r2", "r3"]
    assert set(trial.deaths.values()) == {1} and not trial.marked


def test_a_mark_waits_until_an_engine_has_answered_a_row() -> None:
    table = LeaseTable(queue := PrefixQueue(), trial := CrashTrial(), Admission(None, ""))
    queue.add(rows_of(2))
    for worker in ("w1", "w2"):
        lease = table.lend(worker, 1, 0, True)
        assert lease is not None and lease.ids == ["r0"] and lease.poison is None
        table.leave(worker, "killed", [(lease.number, 0)])
    assert names([poison.row for poison in trial.marked]) == ["r0"]
    lease = table.lend("w3", 1, 0, True)
    assert lease is not None and lease.ids == ["r1"]
    assert table.lend("w4", 1, 0, True) is None
    table.complete("w3", [(lease.number, [0])])
    poison = table.lend("w4", 1, 0, True)
    assert poison is not None and (poison.ids, poison.deaths) == (["r0"], [2])
    assert "died 2 times with this row in it (killed)" in (poison.poison or "")
    table.leave("w4", None, [])  # before its record was durable
    again = table.lend("w5", 1, 0, True)
    assert again is not None and again.poison == poison.poison
