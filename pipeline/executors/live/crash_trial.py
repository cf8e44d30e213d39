"""Finds the row that kills its engine, by bisection. Plain Python: no Ray, no asyncio.

The rows that were inside an engine when its process died form a group of suspects. One half of a group is leased to a
worker that holds nothing else; the other half waits. If the process dies again, the rows that were inside it then are the
group, and all others are cleared. If all rows of the half come out, they are cleared and the other half is the group. So
one culprit among n rows costs at most 1 + log2(n) deaths.

Rules:
- A row is marked as a poison row when it was the only row inside at a death and inside at two deaths or more.
- Until a row has come out of an engine, no row is marked, because the engine may die on every row. The marks wait until a
  row comes out, or until no other row is left to ask.
- Every death counts for `run.max_engine_deaths`, the number of deaths in succession without a finished row. After the
  second death in succession, the cleared rows are tried next, alone on one engine. If they are answered, the engine works
  and the count returns to zero. If the engine keeps dying on them too, it dies on all rows: the run stops before any
  row is marked.
- After a death with no row inside, a lost node or a drained worker, no row is blamed: the trial is repeated with the
  remaining rows.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.executors.requests import PendingRequest

# A row is marked as a poison row after this many engine deaths with it inside. At the last one, it was the only row inside.
DEATHS_TO_MARK = 2

# Chooses up to a number of the given rows. Returns the chosen rows, their reserved costs, and the other rows.
Admit = Callable[[list[PendingRequest], int], tuple[list[PendingRequest], list[float], list[PendingRequest]]]


@dataclass(slots=True)
class Group:
    """Suspects: one of these rows killed an engine. Rows in a lease on trial are not included."""

    rows: list[PendingRequest]
    guilty: bool = True  # False: cleared rows, tried together to prove that an engine works

    @property
    def next_size(self) -> int:
        """The number of rows to try at once."""
        return -(-len(self.rows) // 2) if self.guilty else len(self.rows)


@dataclass(slots=True)
class PoisonRow:
    row: PendingRequest
    reason: str


class CrashTrial:
    """All groups of suspects: those that wait for a worker, and those with a lease on trial."""

    def __init__(self) -> None:
        self.waiting: deque[Group] = deque()
        self.on_trial: dict[int, Group] = {}  # lease -> its group
        self.marked: deque[PoisonRow] = deque()  # to be recorded as failed
        self.recording: dict[int, PoisonRow] = {}  # lease -> the poison row that a worker records
        self.deaths: Counter[bytes] = Counter()  # key -> engine deaths with this row inside
        self.deaths_in_a_row = 0  # of engine processes, with no row finished between
        self.works = False  # a row has come out of an engine
        self.reason = ""  # of the last death

    def __len__(self) -> int:
        """The rows that wait here."""
        groups = (*self.waiting, *self.on_trial.values())
        return sum(len(group.rows) for group in groups) + len(self.marked)

    def suspects(self) -> Iterator[PendingRequest]:
        """The rows of the groups that wait for a worker."""
        return (row for group in self.waiting for row in group.rows)

    # -- lending ---------------------------------------------------------------------------------------------------

    def choose(self, admit: Admit) -> tuple[Group, list[PendingRequest], list[float]] | None:
        """A group, and the rows of it to try next with their costs. None if no group waits, or the
        budget has room for none."""
        for _ in range(len(self.waiting)):
            group = self.waiting.popleft()
            part, costs, rest = admit(group.rows, group.next_size)
            if part:
                group.rows = rest
                return group, part, costs
            self.waiting.append(group)
        return None

    def next_marked(self, nothing_else: bool) -> PoisonRow | None:
        """The next poison row to record. `nothing_else`: no other row is left to ask."""
        return self.marked.popleft() if self.marked and (self.works or nothing_else) else None

    # -- outcomes --------------------------------------------------------------------------------------------------

    def died(self, reason: str) -> None:
        """An engine's process died."""
        self.deaths_in_a_row += 1
        self.reason = reason

    def finished(self) -> None:
        """A row is finished and durable."""
        self.deaths_in_a_row = 0
        self.works = True

    def came_out(self, lease: int) -> None:
        """All rows of a lease came out of the engine. If the lease was on trial, the rest of its group is tried next."""
        self.works = True
        group = self.on_trial.pop(lease, None)
        if group is not None and group.rows:
            self.waiting.appendleft(group)

    def clear(self, row: PendingRequest) -> None:
        """The row came out of an engine. Its deaths no longer count."""
        self.deaths.pop(row.key, None)

    def accuse(self, inside: list[PendingRequest]) -> None:
        """These rows were inside an engine when its process died."""
        if not inside:
            return
        for row in inside:
            self.deaths[row.key] += 1
        first = inside[0]
        if len(inside) == 1 and self.deaths[first.key] >= DEATHS_TO_MARK:
            times = self.deaths[first.key]
            self.marked.append(
                PoisonRow(first, f"the engine's process died {times} times with this row in it ({self.reason})")
            )
        else:
            self.waiting.appendleft(Group(inside))

    def end(self, lease: int, inside: list[PendingRequest], outside: list[PendingRequest]) -> list[PendingRequest]:
        """The worker with this lease on trial is gone. `inside`: the rows that were in its engine when it died; `outside`:
        the others that have not come out. Returns the rows that are cleared without an answer."""
        group = self.on_trial.pop(lease)
        others = outside + group.rows
        if not inside:
            if others:
                group.rows = others
                self.waiting.appendleft(group)
            return []
        self.accuse(inside)
        if self.deaths_in_a_row > 1 and len(others) > 1:
            self.waiting.appendleft(Group(others, guilty=False))
            return []
        return others

    def end_recording(self, lease: int) -> None:
        """The worker with a poison row left before its record was durable. Another worker records the row."""
        self.marked.appendleft(self.recording.pop(lease))
