"""From input files to rows in the workers' hands: Ray Data reads, parses, keys and skips; a dispatcher leases.

Why a dispatcher and not `map_batches` around the engine: leases let every replica take work as fast as it finishes it,
join and leave when it likes, and hand back what it held when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from engines.errors import ConfigError
from pipeline.dataset.reader import ReadSplit, RowReader, SplitSummary
from pipeline.executors.cost_budget import CostBudget, write_spent
from pipeline.executors.live.protocol import Lease
from pipeline.executors.live.queue import PendingRequest, PrefixQueue
from pipeline.executors.live.requests import ROWS_SCHEMA, dataset_of, read_split
from pipeline.monitor.status import ReplicaHeartbeat, RunStatus
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger_index import DedupFilter

# A row that was in an engine when its process died is tried again alone; after this many deaths it is the culprit.
CRASHES_TO_POISON = 2


LEASED, COMPLETED, DURABLE = 0, 1, 2


@dataclass(slots=True)
class LeaseState:
    """A lease as its dispatcher sees it."""

    rows: list[PendingRequest]
    states: bytearray  # LEASED, COMPLETED or DURABLE for each row
    costs: list[float] = field(default_factory=list)  # reserved for each row, where there is a budget
    durable: int = 0


class Dispatcher:
    """The actor between the feed and the workers. Its methods are short, so that one serves hundreds of workers."""

    def __init__(
        self,
        splits: list[ReadSplit],
        row_reader: RowReader,
        done: list[Any],
        fail_on_bad_input: bool,
        small: bool = False,
        budget: CostBudget | None = None,
        output_path: str = "",
    ) -> None:
        self.splits, self.row_reader, self.done = splits, row_reader, done[0]
        self.budget, self.output_path = budget, output_path
        self.writing = asyncio.Lock()
        self.fail_on_bad_input = fail_on_bad_input
        self.small = small  # so small that the processes of a Ray Dataset would take longer to start than to read it
        self.queue = PrefixQueue()
        self.suspects: deque[PendingRequest] = deque()
        self.crashes: Counter[bytes] = Counter()
        self.crash_reason = ""
        self.leases: dict[str, dict[int, LeaseState]] = {}
        self.lent = 0  # rows in the state LEASED
        self.joined: set[str] = set()  # workers that are here, or loading their engine
        self.gone: set[str] = set()  # workers that left; a call of theirs may still be under way
        self.next_lease = 0
        self.summaries: dict[int, SplitSummary] = {}
        self.status_ = RunStatus()
        self.stopping = False
        self.changed = asyncio.Condition()
        self.room = threading.Event()
        self.room.set()

    async def start(self, report: Any, buffer_rows: int) -> None:
        """Starts reading. `report` is this actor's own method of that name."""
        self.buffer_rows = buffer_rows
        loop = self.loop = asyncio.get_running_loop()
        seen = DedupFilter()

        def feed() -> None:
            failure = None
            try:
                for table in self._tables(report):
                    if not len(table):
                        continue
                    fresh = table.filter(pa.array(seen.add(table["key"])))
                    rows = list(map(PendingRequest, *(fresh[name].to_pylist() for name in ROWS_SCHEMA.names)))
                    asyncio.run_coroutine_threadsafe(self._add(rows, len(table) - len(fresh)), loop).result()
                    self.room.wait()
                    if self.stopping:
                        break
            except Exception as error:  # said to the driver, which ends the run with it
                failure = error
            asyncio.run_coroutine_threadsafe(self._fed(failure), loop).result()

        threading.Thread(target=feed, name="feed", daemon=True).start()

    def _tables(self, report: Any) -> Iterator[pa.Table]:
        """The rows to ask, from a thread."""
        if not self.small:
            dataset = dataset_of(self.splits, self.row_reader, self.done, self.fail_on_bad_input, report)
            yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
            return
        import ray

        done = ray.get(self.done)
        for split in self.splits:
            summary = SplitSummary()
            yield from read_split(split, self.row_reader, done, self.fail_on_bad_input, summary)
            self.loop.call_soon_threadsafe(self.summaries.__setitem__, split.number, summary)

    async def _add(self, rows: list[PendingRequest], duplicates: int) -> None:
        self.status_.duplicates += duplicates
        self.queue.add(rows)
        if len(self.queue) >= self.buffer_rows:
            self.room.clear()
        await self._notify()

    async def _fed(self, failure: Exception | None) -> None:
        self.status_.fed = True
        self.queue.longest_first()
        if failure is not None:
            self.stopping = True
            cause: Any = failure
            while getattr(cause, "cause", None) is not None:  # Ray wraps what a task raised
                cause = cause.cause
            self.status_.broken = str(cause) if isinstance(cause, ConfigError) else f"{type(cause).__name__}: {cause}"
        await self._notify()

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def report(self, number: int, summary: SplitSummary) -> None:
        """A read task's account of its piece. Sent again when the task was, so it replaces."""
        self.summaries[number] = summary

    async def take_summaries(self) -> dict[int, SplitSummary]:
        return self.summaries

    async def join(self, worker: str) -> None:
        """`worker` is loading its engine: rows are kept for it."""
        self.joined.add(worker)
        self.status_.replicas[worker] = ReplicaHeartbeat()

    async def pull(
        self,
        worker: str,
        want: int,
        held: int,
        completed: list[tuple[int, list[int]]],
        heartbeat: ReplicaHeartbeat | None = None,
    ) -> Lease | None:
        """Up to `want` rows for `worker`, which still holds `held`; None when the run is over for it.

        `completed` are the (lease, rows) that came out of its engine since the last call. Waits while there is
        nothing, up to a second, then answers with an empty lease.
        """
        if worker in self.gone:
            return None
        if heartbeat is not None:
            self.status_.replicas[worker] = heartbeat
        mine = self.leases.setdefault(worker, {})
        for number, offsets in completed:
            lease_state = mine.get(number)
            if lease_state is not None:
                for at in offsets:
                    self.lent -= lease_state.states[at] == LEASED
                    lease_state.states[at] = max(lease_state.states[at], COMPLETED)
        self.joined.add(worker)
        # One that has its share by now asks again soon, when it has less.
        deadline = asyncio.get_running_loop().time() + (1.0 if held == 0 else 0.1)
        while True:
            if self.stopping or worker in self.gone:
                return None
            lease = self._suspect(mine) if held == 0 and self.suspects else None
            if lease is None and self.queue and (share := self._share() - held) > 0:
                lease = self._lease(worker, mine, min(want, share))
            if lease is not None:
                await self._write_spent()
                return lease
            if self._over():
                return None
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return Lease(-1, [], [], [], last=self.status_.fed)
            async with self.changed:
                try:
                    await asyncio.wait_for(self.changed.wait(), left)
                except TimeoutError:
                    pass

    def _share(self) -> int:
        """The most rows that one worker may hold: an equal part of all that are left, so that none idles at the end."""
        left = len(self.queue) + len(self.suspects) + self.lent
        return -(-left // len(self.joined))

    def _lease(self, worker: str, mine: dict[int, LeaseState], want: int) -> Lease | None:
        """None where the budget has no room for any of the next rows."""
        rows, costs = self._affordable(self.queue.take(worker, want), want)
        if not rows and not self._any_leased():  # one further back may be cheaper
            rows, costs = self._affordable(self.queue.take(worker, len(self.queue)), want)
        if not rows:
            return None
        if len(self.queue) < self.buffer_rows:
            self.room.set()
        return self._lend(mine, rows, costs, last=self.status_.fed and not self.queue)

    def _affordable(self, rows: list[PendingRequest], want: int) -> tuple[list[PendingRequest], list[float]]:
        """Those, up to `want`, for which the budget has room, and what it reserves for them; the others go back."""
        if self.budget is None:
            return rows, []
        fit: list[PendingRequest] = []
        costs: list[float] = []
        back: list[PendingRequest] = []
        for row in rows:
            cost = self.budget.max_cost(row.request)
            if len(fit) < want and self.budget.fits(cost):
                self.budget.reserved += cost
                fit.append(row)
                costs.append(cost)
            else:
                back.append(row)
        self.queue.put_back(back)
        return fit, costs

    def _any_leased(self) -> bool:
        return any(self.leases.values())

    async def _write_spent(self) -> None:
        """Writes down what is about to be spent, unless it is."""
        if self.budget is None:
            return
        async with self.writing:
            if (usd := self.budget.to_write()) is not None:
                await asyncio.to_thread(write_spent, *resolve(self.output_path), usd)
                self.budget.written = usd

    async def settle(self) -> None:
        """Writes down what was spent, when nothing is in flight any more."""
        if self.budget is not None:
            with contextlib.suppress(OSError):  # then more than was spent stands there
                await asyncio.to_thread(write_spent, *resolve(self.output_path), self.budget.spent + self.budget.reserved)

    async def lost(self, worker: str, number: int, at: int) -> bool:
        """A try of this row failed whose answer may have to be paid; whether the budget has room for another."""
        lease_state = self.leases.get(worker, {}).get(number)
        if self.budget is None or lease_state is None:
            return True
        self.budget.spent += lease_state.costs[at]
        await self._write_spent()
        return not self.budget.exceeded

    def _suspect(self, mine: dict[int, LeaseState]) -> Lease | None:
        """The next one alone; None where the budget has room for none of them. A convict costs nothing."""
        for _ in range(len(self.suspects)):
            row = self.suspects[0]
            deaths = self.crashes[row.key]
            is_poison = deaths >= CRASHES_TO_POISON
            cost = 0.0 if self.budget is None or is_poison else self.budget.max_cost(row.request)
            if self.budget is None or self.budget.fits(cost):
                break
            self.suspects.rotate(-1)
        else:
            return None
        self.suspects.popleft()
        if self.budget is not None:
            self.budget.reserved += cost
        lease = self._lend(mine, [row], [cost], last=self.status_.fed and not self.queue and not self.suspects)
        lease.alone, lease.deaths = True, deaths
        if is_poison:
            lease.poison = f"the engine's process died {deaths} times with this row in it ({self.crash_reason})"
        return lease

    def _lend(self, mine: dict[int, LeaseState], rows: list[PendingRequest], costs: list[float], last: bool) -> Lease:
        self.next_lease += 1
        self.lent += len(rows)
        mine[self.next_lease] = LeaseState(rows, bytearray(len(rows)), costs)
        return Lease(
            self.next_lease, [row.key for row in rows], [row.id for row in rows], [row.request for row in rows], last=last
        )

    async def commit(
        self,
        worker: str,
        durable: list[tuple[int, list[int]]],
        counts: RunStatus,
        heartbeat: ReplicaHeartbeat | None = None,
    ) -> None:
        """`worker` has made these rows durable; `counts` adds to the run's figures."""
        mine = self.leases.get(worker, {})
        if heartbeat is not None and worker not in self.gone:
            self.status_.replicas[worker] = heartbeat
        if self.budget is not None:
            self.budget.spent += counts.cost_usd
            self.budget.seen.add(counts.seen)
        for number, offsets in durable:
            lease_state = mine.get(number)
            if lease_state is None:
                continue
            for at in offsets:
                if self.budget is not None and lease_state.states[at] != DURABLE:
                    self.budget.reserved -= lease_state.costs[at]
                lease_state.durable += lease_state.states[at] != DURABLE
                self.lent -= lease_state.states[at] == LEASED
                lease_state.states[at] = DURABLE
            if lease_state.durable == len(lease_state.states):
                del mine[number]
        status = self.status_
        status.done += counts.done
        status.failed += counts.failed
        status.input_tokens += counts.input_tokens
        status.output_tokens += counts.output_tokens
        status.cost_usd += counts.cost_usd
        status.errors.update(counts.errors)
        status.first_errors = {**counts.first_errors, **status.first_errors}
        await self._notify()

    async def leave(self, worker: str, crash: str | None = None, inside: list[tuple[int, int]] | None = None) -> None:
        """`worker` is gone; what it held goes to others. `crash` tells how its process died, if it did; `inside` are the
        (lease, row) that were in its engine and may have to be paid: None where all may.

        Rows that were in its engine then are suspects: tried alone, and convicted after the second death.
        """
        if worker in self.gone:
            return
        self.gone.add(worker)
        self.joined.discard(worker)
        self.queue.leave(worker)
        gone, last = self.status_.gone, self.status_.replicas.pop(worker, ReplicaHeartbeat())
        for name in ("done", "retried", "throttled", "waited_s"):
            setattr(gone, name, getattr(gone, name) + getattr(last, name))
        for number, lease_state in self.leases.pop(worker, {}).items():
            back: list[PendingRequest] = []
            self.lent -= lease_state.states.count(LEASED)
            for at, (row, state) in enumerate(zip(lease_state.rows, lease_state.states, strict=True)):
                if state == DURABLE:
                    continue
                if self.budget is not None:
                    self.budget.reserved -= lease_state.costs[at]
                    if inside is None or (number, at) in inside:
                        self.budget.spent += lease_state.costs[at]
                if state == COMPLETED:  # it came out whole, so it is not to blame
                    self.crashes.pop(row.key, None)
                elif crash is not None:
                    self.crashes[row.key] += 1
                if not self.crashes.get(row.key):
                    back.append(row)
                elif self.crashes[row.key] >= CRASHES_TO_POISON:
                    # Who is convicted goes first, so that the verdict is durable before the next death.
                    self.suspects.appendleft(row)
                else:
                    self.suspects.append(row)
            self.queue.put_back(back)
        if crash is not None:
            self.crash_reason = crash
            self.status_.crashes += 1
        await self._notify()

    async def stop(self) -> None:
        """Leases nothing more; workers finish what they have in flight."""
        self.stopping = True
        self.room.set()
        await self._notify()

    def _over(self) -> bool:
        return self.status_.fed and not self.queue and not self.suspects and not self._any_leased()

    def _out_of_budget(self) -> bool:
        """Whether there are rows, none of them is in flight, and the budget has room for none."""
        waiting = [row for group in self.queue.groups.values() for row in group]
        waiting += [row for row in self.suspects if self.crashes[row.key] < CRASHES_TO_POISON]
        return bool(waiting) and not any(self.budget.fits(self.budget.max_cost(row.request)) for row in waiting)  # type: ignore[union-attr]

    async def status(self) -> RunStatus:
        status = self.status_
        found: Iterable[SplitSummary] = self.summaries.values()
        status.read = sum(s.rows for s in found)
        status.invalid = sum(s.invalid for s in found)
        status.answered = sum(s.answered for s in found)
        status.in_flight = self.lent
        status.workers = len(self.leases)
        status.left = len(self.queue) + len(self.suspects)
        status.trouble = next((heartbeat.trouble for heartbeat in status.replicas.values() if heartbeat.trouble), "")
        if self.budget is not None:
            status.spent = self.budget.spent + self.budget.reserved
            status.broke = not self._any_leased() and self._out_of_budget()
        status.finished = self._over() or self.stopping
        return status
