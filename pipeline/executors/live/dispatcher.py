"""The actor between the input and the workers: it leases rows, and takes a lease back when its worker dies.

`map_batches` around the engine could not do this: leases let each replica take rows as fast as it finishes them, and
join or leave at any time.
"""

from __future__ import annotations

import asyncio
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
from pipeline.monitor.status import ReplicaHeartbeat, RunStatus

# A call of `pull` waits so long for rows: of a worker that holds none, and of one that does.
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
    ) -> None:
        self.feed = Feed(splits, row_reader, done[0], fail_on_bad_input, small)
        self.queue = PrefixQueue()
        self.trial = CrashTrial()
        self.admission = Admission(budget, output_path)
        self.table = LeaseTable(self.queue, self.trial, self.admission)
        self.run_status = RunStatus()
        self.stopping = False
        self.changed = asyncio.Condition()

    # -- the input -------------------------------------------------------------------------------------------------

    async def start(self, report: Any, buffer_rows: int) -> None:
        """Starts reading. `report` is this actor's own method of that name."""
        self.feed.start(report, buffer_rows, self._add, self._fed)

    async def _add(self, rows: list[PendingRequest], duplicates: int) -> None:
        self.run_status.duplicates += duplicates
        self.queue.add(rows)
        self.feed.limit(len(self.queue))
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
        """The summary of one split. A read task that runs again sends it again, so it replaces."""
        self.feed.summaries[number] = summary

    async def take_summaries(self) -> dict[int, SplitSummary]:
        return self.feed.summaries

    # -- the workers -----------------------------------------------------------------------------------------------

    async def join(self, worker: str) -> None:
        """`worker` is loading its engine: its share of the rows is kept for it."""
        self.table.join(worker)
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
        self.table.complete(worker, completed)
        self.table.join(worker)
        # A worker that holds its share asks again soon, when it holds less.
        deadline = asyncio.get_running_loop().time() + (WAIT_S if held == 0 else SHORT_WAIT_S)
        while True:
            if self.stopping or worker in self.table.gone:
                return None
            if (lease := self.table.lend(worker, want, held, self.run_status.fed)) is not None:
                self.feed.limit(len(self.queue))
                await self.admission.write_down()
                return lease
            if self._over():
                return None
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return Lease(-1, [], [], [], last=self.run_status.fed)
            async with self.changed:
                try:
                    await asyncio.wait_for(self.changed.wait(), left)
                except TimeoutError:
                    pass

    async def lost(self, worker: str, number: int, at: int, usd: float | None = None) -> bool:
        """A try of this row failed, and its answer may have to be paid, with `usd` where that is known. Returns whether the
        budget has room for another."""
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
        self.admission.spend(counts.spent + self.table.reserved(worker, counts.unpriced), counts.seen)
        self.table.commit(worker, durable)
        if counts.done + counts.failed > counts.errors["engine_crash"]:
            self.trial.finished()
        status.done += counts.done
        status.failed += counts.failed
        status.input_tokens += counts.input_tokens
        status.output_tokens += counts.output_tokens
        status.cost_usd += counts.cost_usd
        status.cost_unknown += counts.cost_unknown
        status.errors.update(counts.errors)
        status.first_errors = {**counts.first_errors, **status.first_errors}
        await self._notify()

    async def leave(self, worker: str, crash: str | None = None, inside: list[tuple[int, int]] | None = None) -> int:
        """`worker` is gone; others get what it held. See `LeaseTable.leave`.

        Returns the number of engine deaths in a row, with no row finished between.
        """
        if worker not in self.table.gone:
            gone, last = self.run_status.gone, self.run_status.replicas.pop(worker, ReplicaHeartbeat())
            for name in ("done", "retried", "throttled", "waited_s"):
                setattr(gone, name, getattr(gone, name) + getattr(last, name))
            self.table.leave(worker, crash, inside)
            self.run_status.crashes += crash is not None
            await self._notify()
        return self.trial.deaths_in_a_row

    async def left(self) -> set[str]:
        """The names of the workers that are gone. They removed their journals, or the driver has read them."""
        return self.table.gone

    # -- the run ---------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Leases nothing more; workers finish what they have in flight."""
        self.stopping = True
        self.feed.stop()
        await self._notify()

    async def settle(self) -> None:
        """Writes what was spent, when nothing is in flight any more."""
        await self.admission.settle()

    def _over(self) -> bool:
        return self.run_status.fed and not self.table.waiting and self.table.idle

    async def status(self) -> RunStatus:
        status = self.run_status
        found = self.feed.summaries.values()
        status.read = sum(summary.rows for summary in found)
        status.invalid = sum(summary.invalid for summary in found)
        status.answered = sum(summary.answered for summary in found)
        status.in_flight = self.table.lent
        status.workers = len(self.table.leases)
        status.left = self.table.waiting
        status.trouble = next((heartbeat.trouble for heartbeat in status.replicas.values() if heartbeat.trouble), "")
        status.spent = self.admission.committed
        status.broke = self.table.idle and self.admission.has_room_for_none(self.table.unleased())
        status.finished = self._over() or self.stopping
        return status
