"""The actor between the input and the workers: it leases rows, and takes a lease back when its worker dies.

Ray Data's `map_batches` could not do this. With leases, each replica takes rows as fast as it finishes them, and may join
or leave at any time.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from typing import Any

from pipeline.dataset.reader import ReadSplit, RowReader, SplitSummary
from pipeline.executors.cost_budget import CostBudget
from pipeline.executors.live.admission import Admission
from pipeline.executors.live.crash_trial import CrashTrial
from pipeline.executors.live.feed import Feed
from pipeline.executors.live.lease_table import LeaseTable
from pipeline.executors.live.protocol import Lease
from pipeline.executors.live.queue import PrefixQueue
from pipeline.executors.requests import PendingRequest
from pipeline.executors.row_counter import RowCounter
from pipeline.garbage import collect_rarely
from pipeline.monitor.status import ReplicaHeartbeat, ReplicaProblem, RunStatus, merged_problems
from pipeline.storage.claim import join_claim
from pipeline.storage.filesystem import resolve

# The time that a call of `pull` waits for rows: if the worker holds no rows, and if it holds some.
WAIT_S, SHORT_WAIT_S = 1.0, 0.1


class Dispatcher:
    """Its methods are short, so that one dispatcher serves hundreds of workers."""

    def __init__(
        self,
        splits: list[ReadSplit],
        row_reader: RowReader,
        done: list[Any],
        fail_on_bad_input: bool,
        small: bool = False,
        budget: CostBudget | None = None,
        output_path: str = "",
        claim: str | None = None,
    ) -> None:
        collect_rarely()
        if claim is not None:
            join_claim(*resolve(output_path), claim)
        self.feed = Feed(splits, row_reader, done[0], fail_on_bad_input, small)
        self.queue = PrefixQueue()
        self.trial = CrashTrial()
        self.admission = Admission(budget, output_path)
        self.table = LeaseTable(self.queue, self.trial, self.admission)
        self.run_status = RunStatus()
        self.row_counter = RowCounter(self.run_status)
        self.groups: dict[str, str] = {}  # worker -> its hardware entry
        self.deaths: Counter[str] = Counter()  # hardware entry -> its engine deaths in succession, with no row finished
        self.stopping = False
        self.changed = asyncio.Condition()

    # -- the input -------------------------------------------------------------------------------------------------

    async def start(self, report: Any) -> None:
        """Starts reading. `report` is this actor's own method of that name."""
        self.feed.start(report, self._add, self._fed)

    async def _add(self, rows: list[PendingRequest], duplicates: list[bytes]) -> None:
        self.row_counter.read((row.key for row in rows), duplicates)
        self.queue.add(rows)
        self.feed.limit(len(self.queue), self.queue.bytes)
        await self._notify()

    async def _fed(self, reason: str | None) -> None:
        self.run_status.fed = True
        self.queue.longest_first()
        if reason is not None:
            self.stopping = True
            self.run_status.broken = reason
        await self._notify()

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def report(self, number: int, summary: SplitSummary) -> None:
        """The summary of one split. A read task that runs again sends it again; the last one counts."""
        self.feed.report(number, summary)

    async def take_summaries(self) -> dict[int, SplitSummary]:
        return self.feed.summaries

    # -- the workers -----------------------------------------------------------------------------------------------

    async def join(self, worker: str, group: str = "hardware") -> None:
        """`worker`, of a hardware entry, is loading its engine: its share of the rows is kept for it."""
        if worker in self.table.gone:  # the driver ended it while this call was under way
            return
        self.table.join(worker)
        self.groups[worker] = group
        self.run_status.replicas[worker] = ReplicaHeartbeat()

    async def pull(
        self,
        worker: str,
        want: int,
        held: int,
        completed: list[tuple[int, list[int]]],
        heartbeat: ReplicaHeartbeat | None = None,
    ) -> Lease | None:
        """Up to `want` rows for `worker`, which still holds `held`; None when the run is over for it.

        `completed` are the (lease, rows) that came out of its engine since the last call. While no row is ready the call
        waits for a short time, then returns an empty lease.
        """
        if worker in self.table.gone:
            return None
        if heartbeat is not None:
            self.run_status.replicas[worker] = heartbeat
            self.table.paces.note(worker, heartbeat.done, heartbeat.busy)
        self.table.complete(worker, completed)
        self.table.join(worker)
        # A worker that holds its share asks again soon, when it holds less.
        deadline = asyncio.get_running_loop().time() + (WAIT_S if held == 0 else SHORT_WAIT_S)
        while True:
            if self.stopping or worker in self.table.gone:
                return None
            if (lease := self.table.lend(worker, want, held, self.run_status.fed)) is not None:
                self.feed.limit(len(self.queue), self.queue.bytes)
                await self.admission.write_down()
                return lease
            if self._is_over():
                return None
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                # A budget without room for any row keeps the queue full, so the input is never read to its end.
                last = self.run_status.fed or (held == 0 and self.admission.has_room_for_none(self.table.unleased()))
                return Lease(-1, [], [], [], last=last)
            async with self.changed:
                try:
                    await asyncio.wait_for(self.changed.wait(), left)
                except TimeoutError:
                    pass

    async def spend_lost_try(self, worker: str, number: int, at: int, usd: float | None = None) -> bool:
        """A try of this row failed, and the provider may charge for it: `usd`, or None if the cost is unknown. Returns True
        if the budget has room for another try."""
        lease = self.table.leases.get(worker, {}).get(number)
        if lease is None or not lease.costs:
            return True
        self.admission.spend(lease.costs[at] if usd is None else usd)
        await self.admission.write_down()
        return not self.admission.exceeded

    async def commit(
        self,
        worker: str,
        durable: list[tuple[int, list[int]]],
        counts: RunStatus,
        heartbeat: ReplicaHeartbeat | None = None,
    ) -> None:
        """`worker` has made these rows durable; `counts` adds to the run's figures."""
        status = self.run_status
        if heartbeat is not None and worker not in self.table.gone:
            status.replicas[worker] = heartbeat
            self.table.paces.note(worker, heartbeat.done, heartbeat.busy)
        self.admission.spend(counts.spent + self.table.reserved(worker, counts.unpriced), counts.seen)
        self._count_rows(worker, durable, counts)
        self.table.commit(worker, durable)
        if counts.done + counts.failed > sum(type == "engine_crash" for *_, type in counts.failures):
            self.trial.finished()
            self.deaths.pop(self._group(worker), None)
        status.add(counts)
        status.first_errors = {**counts.first_errors, **status.first_errors}
        await self._notify()

    def _count_rows(self, worker: str, durable: list[tuple[int, list[int]]], counts: RunStatus) -> None:
        """Counts the rows of requests that became durable. Requests of a lease that has ended are sent again."""
        keys_of = functools.partial(self.table.keys, worker)
        failures = {key: type for number, at, type in counts.failures for key in keys_of([(number, [at])])}
        truncated = keys_of((number, [at]) for number, at in counts.truncations)
        self.row_counter.finish(keys_of(durable), failures, truncated)

    async def leave(self, worker: str, crash: str | None = None, inside: list[tuple[int, int]] | None = None) -> int | None:
        """`worker` is gone; others get what it held. See `LeaseTable.leave`.

        Returns the number of engine deaths of its hardware entry in a row, with no row of that entry finished between.
        None if the worker had not loaded its engine.
        """
        group = self._group(worker)
        if worker not in self.table.leases and worker not in self.table.gone:
            self.run_status.replicas.pop(worker, None)
            self.table.leave(worker, None, None)
            await self._notify()
            return None
        if worker not in self.table.gone:
            gone, last = self.run_status.gone, self.run_status.replicas.pop(worker, ReplicaHeartbeat())
            for name in ("done", "retried", "throttled", "waited_s"):
                setattr(gone, name, getattr(gone, name) + getattr(last, name))
            self.table.leave(worker, crash, inside)
            self.run_status.crashes += crash is not None
            self.deaths[group] += crash is not None
            await self._notify()
        return self.deaths[group]

    def _group(self, worker: str) -> str:
        return self.groups.get(worker, "hardware")

    async def report_problem(self, problem: ReplicaProblem) -> None:
        """A problem of a replica that does not end the run."""
        self.run_status.problems = merged_problems(self.run_status.problems, [problem])

    async def workers_gone(self) -> set[str]:
        """The names of the workers that are gone. They removed their journals, or the driver has read them."""
        return self.table.gone

    # -- the run ---------------------------------------------------------------------------------------------------

    async def refuse(self, message: str, code: str) -> None:
        """A worker found that the server refuses all rows: leases nothing more. The first reason counts."""
        self.run_status.refusal = self.run_status.refusal or (message, code)
        await self.stop()

    async def stop(self) -> None:
        """Leases nothing more; workers finish what they have in flight."""
        self.stopping = True
        self.feed.stop()
        await self._notify()

    async def settle(self) -> None:
        """Writes what was spent, when nothing is in flight any more."""
        await self.admission.settle()

    def _is_over(self) -> bool:
        return self.run_status.fed and not self.table.waiting and self.table.idle

    async def status(self) -> RunStatus:
        status = self.run_status
        found = self.feed.totals
        status.read, status.invalid, status.answered = found["rows"], found["invalid"], found["answered"]
        status.failed_before, status.truncated_before = found["failed"], found["truncated"]
        status.leased = self.table.lent
        status.workers = len(self.table.leases)
        status.trouble = next((heartbeat.trouble for heartbeat in status.replicas.values() if heartbeat.trouble), "")
        status.spent = self.admission.committed
        status.broke = self.table.idle and self.admission.has_room_for_none(self.table.unleased())
        status.finished = self._is_over() or self.stopping
        return status
