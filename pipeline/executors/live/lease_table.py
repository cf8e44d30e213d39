"""The leases: the rows that each worker holds. Plain Python: no Ray, no asyncio.

A row is in one place at a time: in the queue, in a crash trial, or in a lease. A lease's rows are LEASED, then COMPLETED
(they came out of the engine), then DURABLE (the ledger has them). Rows that are not durable when their worker leaves go
back to the queue; those that were inside its engine when it crashed go to the crash trial.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.executors.live.admission import Admission
from pipeline.executors.live.byte_limits import LEASE_BYTES, LEASED_BYTES, count_within
from pipeline.executors.live.crash_trial import CrashTrial
from pipeline.executors.live.pace import Paces
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
    costs: list[float]  # reserved for each row; empty if there is no budget
    states: bytearray = field(init=False)  # LEASED, COMPLETED or DURABLE for each row
    durable: int = 0

    def __post_init__(self) -> None:
        self.states = bytearray(len(self.rows))


class LeaseTable:
    """Lends rows to workers, and takes them back."""

    def __init__(self, queue: PrefixQueue, trial: CrashTrial, admission: Admission, paces: Paces | None = None) -> None:
        self.queue, self.trial, self.admission = queue, trial, admission
        self.paces = paces or Paces()
        self.leases: dict[str, dict[int, LeaseState]] = {}  # worker -> lease number -> lease
        self.lent_to: Counter[str] = Counter()  # worker -> its rows in the state LEASED; all workers that joined
        self.held_bytes: Counter[str] = Counter()  # worker -> bytes of its rows that are not durable
        self.joined: set[str] = set()  # workers that pull, or load their engine
        self.gone: set[str] = set()  # workers that left; a late call of theirs may still arrive
        self.last_number = 0

    @property
    def waiting(self) -> int:
        """Rows that no worker holds."""
        return len(self.queue) + len(self.trial)

    @property
    def lent(self) -> int:
        """Rows in the state LEASED."""
        return self.lent_to.total()

    @property
    def idle(self) -> bool:
        """True if no lease is out."""
        return not any(self.leases.values())

    def unleased(self) -> Iterator[PendingRequest]:
        """The rows that could be leased next."""
        return itertools.chain(*self.queue.groups.values(), self.trial.suspects())

    def share(self, worker: str, fed: bool) -> int:
        """The most rows that `worker` may hold, so that all workers end together."""
        return self.paces.share(worker, self.lent_to, self.waiting, fed)

    def join(self, worker: str) -> None:
        self.joined.add(worker)
        self.lent_to.setdefault(worker, 0)

    # -- lending ---------------------------------------------------------------------------------------------------

    def lend(self, worker: str, want: int, held: int, fed: bool) -> Lease | None:
        """Up to `want` rows for a worker that still holds `held`. `fed`: the whole input is in the queue or past it.

        None if no row is ready, the worker has its share of the rows or of `LEASED_BYTES`, or the budget has no room for
        any row.
        """
        self.leases.setdefault(worker, {})
        self.lent_to.setdefault(worker, 0)
        poison = self.trial.next_marked(fed and self.idle and not self.queue and not self.trial.waiting)
        if poison is not None:
            lease = self._new_lease(worker, [poison.row], [], fed)
            self.trial.recording[lease.number] = poison
            lease.poison = poison.reason
            return lease
        if held == 0 and (chosen := self.trial.choose(self.admission.admit)) is not None:
            group, rows, costs = chosen
            lease = self._new_lease(worker, rows, costs, fed)
            self.trial.on_trial[lease.number] = group
            lease.alone = True
            return lease
        room = LEASED_BYTES // max(1, len(self.joined)) - self.held_bytes[worker]
        if not self.queue or (held and room <= 0):
            return None
        want = min(want, self.share(worker, fed) - held)
        if want <= 0:
            return None
        rows, costs = self._from_queue(worker, want, want, room)
        if not rows and self.idle:  # a row further back may be cheaper
            rows, costs = self._from_queue(worker, len(self.queue), want, room)
        return self._new_lease(worker, rows, costs, fed) if rows else None

    def _from_queue(self, worker: str, look: int, want: int, room: int) -> tuple[list[PendingRequest], list[float]]:
        """Up to `want` rows, and about `room` bytes, of the next `look` rows. The others go back, also those that the
        budget has no room for."""
        rows, costs, others = self.admission.admit(self.queue.take(worker, look), want)
        count = count_within((len(row.request) for row in rows), min(room, LEASE_BYTES))
        for cost in costs[count:]:
            self.admission.release(cost)
        self.queue.put_back([*rows[count:], *others])
        return rows[:count], costs[:count]

    def _new_lease(self, worker: str, rows: list[PendingRequest], costs: list[float], fed: bool) -> Lease:
        self.last_number += 1
        self.lent_to[worker] += len(rows)
        self.held_bytes[worker] += sum(len(row.request) for row in rows)
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
                    self.lent_to[worker] -= 1
            self._update_trial(number, lease)

    def commit(self, worker: str, durable: Places) -> None:
        """The ledger has the answers of these rows."""
        mine = self.leases.get(worker, {})
        for number, offsets in durable:
            lease = mine.get(number)
            if lease is None:
                continue
            states, rows = lease.states, lease.rows
            for at in offsets:
                if states[at] == DURABLE:
                    continue
                self.lent_to[worker] -= states[at] == LEASED
                states[at] = DURABLE
                lease.durable += 1
                self.held_bytes[worker] -= len(rows[at].request)
                if lease.costs:
                    self.admission.release(lease.costs[at])
            self._update_trial(number, lease)
            if lease.durable == len(states):
                self.trial.recording.pop(number, None)
                del mine[number]
            else:  # frees the memory of the requests
                for at in offsets:
                    rows[at] = rows[at]._replace(request=b"")

    def keys(self, worker: str, places: Places) -> list[bytes]:
        """The keys of rows in leases of `worker` that have not ended."""
        mine = self.leases.get(worker, {})
        found: list[bytes] = []
        for number, offsets in places:
            if (lease := mine.get(number)) is not None:
                rows = lease.rows
                found += [rows[at].key for at in offsets]
        return found

    def reserved(self, worker: str, places: Iterable[tuple[int, int]]) -> float:
        """The most that these (lease, row) of `worker` may cost, in US dollars; 0 without a budget."""
        mine = self.leases.get(worker, {})
        return sum(mine[number].costs[at] for number, at in places if number in mine and mine[number].costs)

    def _update_trial(self, number: int, lease: LeaseState) -> None:
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
        self.held_bytes.pop(worker, None)
        self.lent_to.pop(worker, None)
        self.paces.leave(worker)
        self.queue.leave(worker)
        if crash is not None:
            self.trial.died(crash)
        places = None if inside is None else set(inside)
        suspects: list[PendingRequest] = []
        for number, lease in self.leases.pop(worker, {}).items():
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
        """Frees the reservations of rows that are not durable. `paid`: the rows whose answers may be charged; None: all of
        them."""
        for at, cost in enumerate(lease.costs):
            if lease.states[at] != DURABLE:
                self.admission.release(cost, spent=paid is None or (number, at) in paid)
