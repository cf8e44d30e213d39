"""The actor around an engine: it pulls leased rows, asks each as soon as a slot is free, and commits the answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engines.base import Engine
from engines.config import EngineConfig
from engines.errors import EngineError, Failure, Outage
from engines.params import GenerationParams
from engines.registry import load_engine
from engines.text import one_line
from engines.types import Completion, Request
from engines.usage import Usage
from pipeline.executors.cost_budget import check_model, shared_bytes
from pipeline.executors.live.engine_journal import EngineJournal, JournalPlace, journal_place
from pipeline.executors.live.protocol import Lease
from pipeline.executors.live.rate_limiter import reserve_through_ray
from pipeline.executors.live.recorder import LeasedRow, RowRecorder
from pipeline.executors.live.secrets import Secrets, settle_environment
from pipeline.executors.requests import request_of
from pipeline.monitor.metrics import Metrics
from pipeline.monitor.status import ReplicaHeartbeat
from pipeline.monitor.traces import RequestSpans, Trace
from pipeline.storage.exact_json import loads
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger import Compactor, Record, write_segment

DRAIN_FLUSH_S = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    engine: EngineConfig
    generation: GenerationParams
    output_path: str
    flush_s: float
    drain_s: float
    max_outage_s: float
    cpus: float  # 0: the whole machine's
    trace: Trace | None = None
    budget: bool = False  # whether each try must be asked for


class Worker:
    """One replica. `run` returns when there is nothing left to do, or after `drain`."""

    def __init__(self, config: WorkerConfig, name: str, dispatcher: Any) -> None:
        self.config, self.name, self.dispatcher = config, name, dispatcher
        self.fs, self.root = resolve(config.output_path)
        self.compactor = Compactor(self.fs, self.root, name)
        self.flush_s = config.flush_s
        self.node_goes_away = False
        self.busy = 0  # rows in the engine
        self.unreported: list[Record] = []  # what metrics do not have yet
        self.waits: list[float] = []  # likewise: seconds that rows waited here
        self.queue: deque[LeasedRow] = deque()
        self.held = 0  # rows in the queue or in the engine
        self.ended = False  # no more rows will come
        self.last = False  # the feed had nothing more when it was last asked
        self.recorder = RowRecorder(config.engine, shared_bytes(config.generation))
        self.inside: dict[bytes, LeasedRow] = {}  # by key: rows in the engine
        self.journal: EngineJournal | None = None  # the same, for whoever looks after this process died
        self.dying = False
        self.work = asyncio.Condition()  # the queue grew, or the end came
        self.less = asyncio.Event()  # fewer rows are held
        self.idle = asyncio.Event()  # nothing held, nothing to come: a good moment to flush
        self.flushing = asyncio.Lock()
        self.puller: asyncio.Task[None] | None = None
        self.engine: Engine | None = None
        self.spans: RequestSpans | None = None

    async def run(self, secrets: Secrets) -> bool:
        """Loads the engine and works. Returns true if it ended only because its node goes away (`leave_nodes`).

        Raises `ConfigError` if the engine cannot be loaded, `Outage` if its server does not answer.
        """
        settle_environment(secrets, self.config.cpus)
        await self.dispatcher.join.remote(self.name)
        self.metrics = Metrics(self.config.engine)
        if self.config.trace is not None:
            self.spans = RequestSpans(self.config.trace, self.config.engine, self.name)
        engine = self.engine = await asyncio.to_thread(load_engine, self.config.engine)
        engine.check(self.config.generation)
        if (remote := engine.remote) is not None:
            remote.attach(reserve_through_ray, self.config.max_outage_s)
            if self.config.budget:
                remote.set_budget(self._check_budget)
        with contextlib.suppress(OSError):  # without it, all rows held here are suspects if this process dies
            self.journal = EngineJournal(journal_place().path, engine.concurrency)
        slots = [asyncio.create_task(self._slot(engine, at)) for at in range(engine.concurrency)]
        flusher = asyncio.create_task(self._flush_often())
        self.puller = asyncio.create_task(self._pull(engine.concurrency))
        if self.node_goes_away:  # it was told so while it was loading
            self.puller.cancel()
        try:
            await _until(self.puller, [flusher, *slots])
            await self._end()
            done, late = await asyncio.wait(slots, timeout=self.config.drain_s)
            for slot in late:  # they go back to the dispatcher
                slot.cancel()
            for slot in done:
                slot.result()
        finally:
            async with self.flushing:  # a flush under way ends first
                flusher.cancel()
            await asyncio.gather(flusher, return_exceptions=True)
            await self._flush()
            self._report_metrics()
            if self.journal is not None:
                journal, self.journal = self.journal, None
                journal.close()
            await self.dispatcher.leave.remote(self.name, None, _places(self.inside.values()))
            await asyncio.to_thread(engine.close)
            if self.spans is not None:
                await asyncio.to_thread(self.spans.close)
        return self.node_goes_away

    async def place(self) -> JournalPlace:
        """The place of this worker's journal."""
        return journal_place()

    async def leave_nodes(self, nodes: frozenset[str]) -> None:
        """As `drain`, if this replica's node is among `nodes`, which are about to go."""
        import ray

        if ray.get_runtime_context().get_node_id() in nodes:
            self.node_goes_away = True
            await self.drain()

    async def drain(self) -> None:
        """Takes no more rows, gives back those not yet in the engine, and finishes those in flight within `drain_s`.

        Finished rows are flushed at once, and often: the caller may end this process at any time.
        """
        self.flush_s = min(self.flush_s, DRAIN_FLUSH_S)
        self.idle.set()
        if self.puller is not None:
            self.puller.cancel()
        if self.engine is not None and self.engine.remote is not None:
            self.engine.remote.drain()

    async def _end(self) -> None:
        self.ended = True
        self.queue.clear()
        async with self.work:
            self.work.notify_all()

    async def _pull(self, concurrency: int) -> None:
        """Keeps up to two rows for each slot: one in the engine, one waiting."""
        window = 2 * concurrency
        while True:
            while self.held > window - max(1, concurrency // 2):
                self.less.clear()
                await self.less.wait()
            completed = self.recorder.take_completed()
            wanted = window - self.held
            lease: Lease | None = await self.dispatcher.pull.remote(
                self.name, wanted, self.held, completed, self._heartbeat()
            )
            if lease is None:
                return
            self.last = lease.last
            if lease.poison is not None:
                await self._record_poison(lease)
                continue
            self.held += len(lease)
            self._maybe_idle()
            rows = zip(lease.deaths or [0] * len(lease), lease.keys, lease.ids, lease.requests, strict=True)
            async with self.work:
                now = time.monotonic()
                self.queue.extend(LeasedRow(lease.number, at, *row, now) for at, row in enumerate(rows))
                self.work.notify(len(lease))
            while lease.alone and self.held:
                self.less.clear()
                await self.less.wait()
            if lease.alone:  # durable before the next rows on trial can kill this process
                await self._flush()

    async def _slot(self, engine: Engine, slot: int) -> None:
        """One slot of the engine: takes the next row as soon as it has answered the one before."""
        while True:
            if not self.queue:
                async with self.work:
                    await self.work.wait_for(lambda: self.queue or self.ended)
                if not self.queue:
                    return
            row = self.queue.popleft()
            self.waits.append(time.monotonic() - row.since)
            self.busy += 1
            self.inside[row.key] = row
            if self.journal is not None:
                self.journal.enter(slot, row.lease, row.offset)
            began_ns = time.time_ns()
            try:
                completion = await engine.generate(self._request(row))
            except EngineError as error:  # from a row's override
                completion = Completion(error=Failure.of(error), engine=engine.kind, attempts=0)
            except asyncio.CancelledError:  # after `drain_s`: the engine may still answer and charge it
                if (cost := engine.cost(Usage(known=False), None)) is None:
                    lost = Completion(
                        error=Failure("cancelled", "the run ended before this row was answered"), cost_usd=cost
                    )
                    self.recorder.supersede(row, lost)
                raise
            except Exception as error:  # a bug, ours or a library's: one row must not end the run
                logger.exception("row %s: a bug", row.id)
                reason = f"a bug: {type(error).__name__}: {one_line(error)}"
                completion = Completion(error=Failure("server", reason), engine=engine.kind)
                completion.cost_usd = engine.cost(Usage(known=False), None)  # an answer may have come before the bug
            finally:
                self.busy -= 1
                if self.journal is not None:
                    self.journal.clear(slot)
            if self.spans is not None:
                self.spans.add(row.key, row.id, began_ns, completion)
            failed = completion.error
            gone = engine.remote.outage if failed is not None and failed.retryable and engine.remote is not None else None
            if failed is not None and (gone or failed.type in ("cancelled", "engine_crash")):  # it goes back
                self.recorder.record_tries(row, completion)
                if failed.type == "engine_crash":
                    await self._die(failed.message)
                del self.inside[row.key]
                if gone:
                    raise Outage(gone)
            else:
                del self.inside[row.key]
                self.recorder.record(row, completion)
            self.held -= 1
            self.less.set()
            self._maybe_idle()

    async def _die(self, reason: str) -> None:
        """Ends this process, whose engine is broken, so that a new one takes its place. The rows inside the engine are
        suspects."""
        if self.dying:  # another row came first
            await asyncio.Event().wait()
        self.dying = True
        inside = _places(self.inside.values())
        await self._flush()
        if self.journal is not None:
            self.journal.close()
        await self.dispatcher.leave.remote(self.name, reason, inside)
        os._exit(1)

    def _request(self, row: LeasedRow) -> Request:
        request = request_of(loads(row.request), self.config.generation, row.key)
        if self.config.budget:
            check_model(request, self.config.engine)
        return request

    async def _record_poison(self, lease: Lease) -> None:
        """Records poison rows as failed, without asking them."""
        for at, (deaths, key, id) in enumerate(zip(lease.deaths, lease.keys, lease.ids, strict=True)):
            completion = Completion(error=Failure("engine_crash", lease.poison or ""), attempts=0)
            if self.engine is not None:
                completion.cost_usd = self.engine.cost(Usage(known=False), None)
            completion.engine, completion.model = self.config.engine.kind, self.config.engine.model
            self.recorder.record(LeasedRow(lease.number, at, deaths, key, id, b""), completion)
        await self._flush()

    async def _check_budget(self, request: Request, usd: float | None) -> bool:
        row = self.inside[bytes.fromhex(request.key[:64])]  # the keys of turns and of other tries are longer
        row.charged += usd or 0.0
        room: bool = await self.dispatcher.lost.remote(self.name, row.lease, row.offset, usd)
        return room

    def _heartbeat(self) -> ReplicaHeartbeat:
        engine = self.engine
        if engine is None:
            return ReplicaHeartbeat()
        leaving = self.puller is not None and self.puller.done()
        remote = engine.remote
        counts = remote.counts if remote is not None else {}
        return ReplicaHeartbeat(
            "leaving" if leaving else "working",
            self.busy,
            self.recorder.done,
            remote.admitted if remote is not None else None,
            engine.config.max_concurrency or engine.concurrency,
            int(counts.get("retried", 0)),
            int(counts.get("throttled", 0)),
            counts.get("limiter_wait_seconds", 0.0),
            remote.stall_reason if remote is not None else "",
        )

    def _maybe_idle(self) -> None:
        if self.held == 0 and self.last and self.recorder.records:
            self.idle.set()

    async def _flush_often(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                # Not `wait_for`, which forgets that it was cancelled where both happen at once (Python 3.11).
                async with asyncio.timeout(self.flush_s):
                    await self.idle.wait()
            self.idle.clear()
            await self._flush()
            self._report_metrics()

    async def _flush(self) -> None:
        async with self.flushing:
            if not self.recorder.records:
                return
            records, places = self.recorder.take_records()
            for wait in (0.5, 2.0, None):
                try:
                    path = await asyncio.to_thread(write_segment, self.fs, self.root, self.name, records)
                    break
                except OSError:
                    if wait is None:  # a later flush may succeed
                        self.recorder.put_back(records, places)
                        raise
                    await asyncio.sleep(wait)
            self.unreported += records
            counts = self.recorder.take_counts()
            await self.dispatcher.commit.remote(self.name, places, counts, self._heartbeat())
            with contextlib.suppress(OSError):  # merging segments is not needed for durability
                await asyncio.to_thread(self.compactor.add, path)

    def _report_metrics(self) -> None:
        if self.engine is not None:
            counts = self.engine.remote.counts if self.engine.remote is not None else {}
            self.metrics.record(self.unreported, self.waits, counts, self.busy, len(self.queue))
            self.unreported, self.waits = [], []


def _places(rows: Iterable[LeasedRow]) -> list[tuple[int, int]]:
    return [(row.lease, row.offset) for row in rows]


async def _until(puller: asyncio.Task[None], others: list[asyncio.Task[None]]) -> None:
    """Waits until the puller ends, or `drain` cancels it. Raises the exception of the first task that fails."""
    done, _ = await asyncio.wait([puller, *others], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        if not task.cancelled():
            task.result()
