"""The leases: which worker holds which rows. Plain Python: no Ray, no asyncio.

A row is in one place at a time: in the queue, in a crash trial, or in a lease. A lease's rows are LEASED, then COMPLETED
(they came out of the engine), then DURABLE (the ledger has them). Rows that are not durable when their worker leaves go
back to the queue; those that were inside its engine when it crashed go to the crash trial.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.executors.live.admission import Admission
from pipeline.executors.live.crash_trial import CrashTrial
from pipeline.executors.live.protocol import Lease
from pipeline.executors.live.queue import PrefixQueue
from pipeline.executors.requests import PendingRequest

LEASED, COMPLETED, DURABLE = 0, 1, 2

# (lease, offsets of rows in it)
Places = Iterable[tuple[int, list[int]]]


@dataclass(slots=True)
class LeaseState:
    """A lease as the dispatcher sees it."""

    rows: list[PendingRequest]
    costs: list[float]  # reserved for each row; empty where there is no budget
    states: bytearray = field(init=False)  # LEASED, COMPLETED or DURABLE for each row
    durable: int = 0

    def __post_init__(self) -> None:
        self.states = bytearray(len(self.rows))


class LeaseTable:
    """Lends rows to workers, and takes them back."""

    def __init__(self, queue: PrefixQueue, trial: CrashTrial, admission: Admission) -> None:
        self.queue, self.trial, self.admission = queue, trial, admission
        self.leases: dict[str, dict[int, LeaseState]] = {}  # worker -> lease number -> lease
        self.lent = 0  # rows in the state LEASED
        self.joined: set[str] = set()  # workers that pull, or load their engine
        self.gone: set[str] = set()  # workers that left; a call of theirs may still be under way
        self.last_number = 0

    @property
    def waiting(self) -> int:
        """Rows that no worker holds."""
        return len(self.queue) + len(self.trial)

    @property
    def idle(self) -> bool:
        """True if no lease is out."""
        return not any(self.leases.values())

    def unleased(self) -> Iterator[PendingRequest]:
        """The rows that could be leased next."""
        return itertools.chain(*self.queue.groups.values(), self.trial.suspects())

    def share(self) -> int:
        """The most rows that one worker may hold: an equal part of all that are left, so that none idles at the end."""
        return -(-(self.waiting + self.lent) // max(1, len(self.joined)))

    def join(self, worker: str) -> None:
        self.joined.add(worker)

    # -- lending ---------------------------------------------------------------------------------------------------

    def lend(self, worker: str, want: int, held: int, fed: bool) -> Lease | None:
        """Up to `want` rows for a worker that still holds `held`. `fed`: the whole input is in the queue or past it.

        None where no row is ready, the worker has its share, or the budget has no room for any row.
        """
        self.leases.setdefault(worker, {})
        poison = self.trial.next_marked(fed and self.idle and not self.queue and not self.trial.waiting)
        if poison is not None:
            lease = self._record(worker, [poison.row], [], fed)
            self.trial.recording[lease.number] = poison
            lease.poison = poison.reason
            return lease
        if held == 0 and (chosen := self.trial.choose(self.admission.admit)) is not None:
            group, rows, costs = chosen
            lease = self._record(worker, rows, costs, fed)
            self.trial.on_trial[lease.number] = group
            lease.alone = True
            return lease
        want = min(want, self.share() - held)
        if not self.queue or want <= 0:
            return None
        rows, costs = self._from_queue(worker, want, want)
        if not rows and self.idle:  # a row further back may be cheaper
            rows, costs = self._from_queue(worker, len(self.queue), want)
        return self._record(worker, rows, costs, fed) if rows else None

    def _from_queue(self, worker: str, look: int, want: int) -> tuple[list[PendingRequest], list[float]]:
        """Up to `want` rows of the next `look`; those that the budget has no room for go back."""
        rows, costs, others = self.admission.admit(self.queue.take(worker, look), want)
        self.queue.put_back(others)
        return rows, costs

    def _record(self, worker: str, rows: list[PendingRequest], costs: list[float], fed: bool) -> Lease:
        self.last_number += 1
        self.lent += len(rows)
        self.leases[worker][self.last_number] = LeaseState(rows, costs)
        deaths = [self.trial.deaths[row.key] for row in rows] if self.trial.deaths else []
        return Lease(
            self.last_number,
            [row.key for row in rows],
            [row.id for row in rows],
            [row.request for row in rows],
            deaths=deaths,
            last=fed and not self.waiting,
        )

    # -- progress --------------------------------------------------------------------------------------------------

    def complete(self, worker: str, completed: Places) -> None:
        """These rows came out of the worker's engine."""
        mine = self.leases.get(worker, {})
        for number, offsets in completed:
            lease = mine.get(number)
            if lease is None:
                continue
            states = lease.states
            for at in offsets:
                if states[at] == LEASED:
                    states[at] = COMPLETED
                    self.lent -= 1
            self._look_at_trial(number, lease)

    def commit(self, worker: str, durable: Places) -> None:
        """The ledger has the answers of these rows."""
        mine = self.leases.get(worker, {})
        for number, offsets in durable:
            lease = mine.get(number)
            if lease is None:
                continue
            states = lease.states
            for at in offsets:
                if states[at] == DURABLE:
                    continue
                self.lent -= states[at] == LEASED
                states[at] = DURABLE
                lease.durable += 1
                if lease.costs:
                    self.admission.release(lease.costs[at])
            self._look_at_trial(number, lease)
            if lease.durable == len(states):
                self.trial.recording.pop(number, None)
                del mine[number]

    def reserved(self, worker: str, places: Iterable[tuple[int, int]]) -> float:
        """The most that these (lease, row) of `worker` may cost, in US dollars; 0 without a budget."""
        mine = self.leases.get(worker, {})
        return sum(mine[number].costs[at] for number, at in places if number in mine and mine[number].costs)

    def _look_at_trial(self, number: int, lease: LeaseState) -> None:
        if number in self.trial.recording:
            return
        self.trial.works = True
        if number in self.trial.on_trial and LEASED not in lease.states:
            self.trial.came_out(number)

    # -- the end of a worker ---------------------------------------------------------------------------------------

    def leave(self, worker: str, crash: str | None, inside: list[tuple[int, int]] | None) -> None:
        """The worker is gone; others get what it held.

        `crash`: the reason, if its engine's process died; else None. `inside`: the (lease, row) that were in the engine at
        that moment. None: not known; then all leased rows without a result are suspects.
        """
        self.gone.add(worker)
        self.joined.discard(worker)
        self.queue.leave(worker)
        if crash is not None:
            self.trial.died(crash)
        places = None if inside is None else set(inside)
        suspects: list[PendingRequest] = []
        for number, lease in self.leases.pop(worker, {}).items():
            self.lent -= lease.states.count(LEASED)
            # After a crash, answers that were paid and not yet durable are lost too.
            self._release(number, lease, places if crash is None else None)
            if number in self.trial.recording:
                self.trial.end_recording(number)
                continue
            back: list[PendingRequest] = []
            blamed: list[PendingRequest] = []
            others: list[PendingRequest] = []
            for at, (row, state) in enumerate(zip(lease.rows, lease.states, strict=True)):
                if state == COMPLETED:
                    self.trial.clear(row)
                    back.append(row)
                elif state == LEASED:
                    guilty = crash is not None and (places is None or (number, at) in places)
                    (blamed if guilty else others).append(row)
            if number in self.trial.on_trial:
                back += self.trial.end(number, blamed, others)
            else:
                back += others
                suspects += blamed
            self.queue.put_back(back)
        self.trial.accuse(suspects)

    def _release(self, number: int, lease: LeaseState, paid: set[tuple[int, int]] | None) -> None:
        """Gives back what is reserved for rows that are not durable. `paid`: those whose answer may have to be paid; None:
        all of them."""
        for at, cost in enumerate(lease.costs):
            if lease.states[at] != DURABLE:
                self.admission.release(cost, spent=paid is None or (number, at) in paid)
