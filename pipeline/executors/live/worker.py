"""The actor around an engine: pulls leased rows, gives each to the engine when a slot is free, commits the answers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engines.base import Engine
from engines.config import EngineConfig
from engines.errors import EngineError, ErrorCode, Failure, Outage
from engines.params import GenerationParams
from engines.registry import load_engine
from engines.tasks import CHAT
from engines.text import one_line
from engines.types import Completion, Request
from engines.usage import Usage
from pipeline.executors.cost_budget import check_model, shared_bytes
from pipeline.executors.live.byte_limits import HELD_BYTES, LEASE_BYTES
from pipeline.executors.live.engine_journal import EngineJournal, JournalPlace, journal_place, remove_orphans
from pipeline.executors.live.flusher import Flusher
from pipeline.executors.live.memory_limit import MemoryLimit, Verdict
from pipeline.executors.live.protocol import Departure, Lease
from pipeline.executors.live.rate_limiter import reserve_through_ray
from pipeline.executors.live.recorder import LeasedRow, RowRecorder
from pipeline.executors.live.refusals import RefusalGate
from pipeline.executors.live.secrets import Secrets, settle_environment
from pipeline.executors.live.waiting_rows import WaitingRows
from pipeline.executors.requests import request_of
from pipeline.garbage import collect_rarely
from pipeline.monitor.metrics import Metrics
from pipeline.monitor.status import ReplicaHeartbeat, ReplicaProblem, RunStatus
from pipeline.monitor.traces import RequestSpans, Trace
from pipeline.storage.claim import join_claim
from pipeline.storage.exact_json import loads
from pipeline.storage.filesystem import resolve

# The longest time between two flushes during a drain.
DRAIN_FLUSH_S = 0.5
# A worker holds the rows that its engine finishes in this time, and at least two for each slot: so a fast engine needs few
# calls of the dispatcher.
HELD_S = 0.1
# An engine that answers without a pause gives way to the other tasks of the loop after so many rows.
ROWS_WITHOUT_PAUSE = 64
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
    budget: bool = False  # if true, each try needs room in the budget
    claim: str | None = None  # the path of the run's claim to the output
    same_refusals_stop: bool = True  # if true, the run stops if the first rows all get the same error
    task: str = CHAT  # of the rows; lines of OpenAI batch files have their own
    group: str = "hardware"  # the hardware entry of this replica


class Worker:
    """One replica. `run` returns when there is nothing left to do, or after `drain`."""

    def __init__(self, config: WorkerConfig, name: str, dispatcher: Any) -> None:
        self.config, self.name, self.dispatcher = config, name, dispatcher
        self.fs, self.root = resolve(config.output_path)
        join_claim(self.fs, self.root, config.claim)
        self.departure: Departure | None = None  # known before the end
        self.memory = MemoryLimit(sys.maxsize)  # replaced when the engine is loaded
        self.waits: list[float] = []  # seconds that rows waited here; taken by the metrics
        self.held = self.held_bytes = 0  # rows that wait or are in the engine
        self.last = False  # the feed had nothing more when it was last asked
        self.recorder = RowRecorder(config.engine, shared_bytes(config.generation), config.budget)
        self.flusher = Flusher(self.fs, self.root, name, self.recorder, config.flush_s, self._commit)
        self.waiting = WaitingRows(lambda: self.flusher.full, lambda: self.memory.lowered_to)
        self.inside: dict[bytes, LeasedRow] = {}  # by key: rows in the engine
        self.journal: EngineJournal | None = None  # the same in a file, which is read if this process dies
        self.dying = False
        self.reported_trouble = ""  # `trouble` in the last heartbeat
        self.reported_busy = 0  # `busy` in the last heartbeat
        self.rows_released = asyncio.Event()  # fewer rows are held
        self.puller: asyncio.Task[None] | None = None
        self.engine: Engine | None = None
        self.spans: RequestSpans | None = None

    async def run(self, secrets: Secrets) -> Departure:
        """Loads the engine and works.

        Raises `ConfigError` or `EngineError` if the engine cannot be loaded, `Outage` if its server does not answer.
        """
        settle_environment(secrets, self.config.cpus)
        await self.dispatcher.join.remote(self.name, self.config.group)
        self.metrics = Metrics(self.config.engine)
        if self.config.trace is not None:
            self.spans = RequestSpans(self.config.trace, self.config.engine, self.name)
        engine = self.engine = await asyncio.to_thread(load_engine, self.config.engine)
        engine.check(self.config.generation)
        concurrency = engine.concurrency_for(self.config.task)
        _tune_garbage_collection()
        self.memory = MemoryLimit(concurrency, engine.config.max_concurrency or engine.concurrency)
        self.gate = RefusalGate(self.recorder, engine, self.config.same_refusals_stop)
        if (remote := engine.remote) is not None:
            remote.attach(reserve_through_ray, self.config.max_outage_s)
            if concurrency == engine.concurrency:  # otherwise a request has several rows, and its room is no row's room
                self.waiting.room = lambda: remote.room
                remote.notify_of_room(self.waiting.note_room)
            if self.config.budget:
                remote.set_budget(self._check_budget)
        slots = [asyncio.create_task(self._slot(engine, at)) for at in range(concurrency)]
        flusher = asyncio.create_task(self.flusher.flush_often(self._after_flush))
        merger = asyncio.create_task(self.flusher.merge_often())
        self.puller = asyncio.create_task(self._pull(engine))
        if self.departure is not None:  # the notice came while the engine was loading
            self.puller.cancel()
        try:
            await _wait_for_puller(self.puller, [flusher, merger, *slots])
            await self.waiting.end()
            done, late = await asyncio.wait(slots, timeout=self.config.drain_s)
            for slot in late:  # their rows go back to the dispatcher
                slot.cancel()
            for slot in done:
                slot.result()
        finally:
            async with self.flusher.flushing:  # a flush under way ends first
                flusher.cancel()
            await asyncio.gather(flusher, return_exceptions=True)
            self.gate.give_back()
            await self.flusher.flush()
            self.flusher.end()
            self._report_metrics()
            await asyncio.gather(merger, return_exceptions=True)
            if self.journal is not None:
                journal, self.journal = self.journal, None
                journal.close()
            # The driver ends this process soon after the last worker has left.
            if self.spans is not None:
                await self.spans.close()
            await self.dispatcher.leave.remote(self.name, None, _places(self.inside.values()))
            await asyncio.to_thread(_close, engine, self.departure)
        return self.departure or Departure()

    async def place(self) -> JournalPlace:
        """The place of this worker's journal."""
        return journal_place()

    async def _open_journal(self, slots: int) -> None:
        """Makes the journal. A worker without rows makes none: the run may end while it starts, and the driver removes
        the files that are there at the end."""
        with contextlib.suppress(OSError):  # without it, all rows held here are suspects if this process dies
            path = journal_place().path
            self.journal = EngineJournal(path, slots)
            await asyncio.to_thread(remove_orphans, path)

    async def leave_nodes(self, nodes: frozenset[str]) -> None:
        """As `drain`, if this replica's node is among `nodes`, which are about to go."""
        import ray

        if ray.get_runtime_context().get_node_id() in nodes:
            await self._depart(Departure(replaced=True))

    async def drain(self) -> None:
        """Takes no more rows, gives back those not yet in the engine, and finishes those in flight within `drain_s`.

        Finished rows are flushed at once, and often: the caller may end this process at any time.
        """
        self.flusher.flush_s = min(self.flusher.flush_s, DRAIN_FLUSH_S)
        self.flusher.now.set()
        if self.puller is not None:
            self.puller.cancel()
        if self.engine is not None and self.engine.remote is not None:
            self.engine.remote.drain()

    async def _pull(self, engine: Engine) -> None:
        """Keeps two rows for each slot: one in the engine, one waiting. More if the engine is fast (`HELD_S`); fewer if the
        rows are large."""
        window, pulled, since = 2 * self.memory.at_once, 0, time.monotonic()
        opened = False
        while True:
            while self.held and (
                self.held > window - max(1, (window - self.memory.at_once) // 2)
                or self.held_bytes > HELD_BYTES - LEASE_BYTES
            ):
                self.rows_released.clear()
                await self.rows_released.wait()
            if (now := time.monotonic()) > since + HELD_S:
                rate = (pulled - self.held) / (now - since)
                at_once = self.memory.at_once
                window, pulled, since = max(2 * at_once, at_once + int(rate * HELD_S)), self.held, now
            completed = self.recorder.take_completed()
            wanted = max(1, window - self.held)
            lease: Lease | None = await self.dispatcher.pull.remote(
                self.name, wanted, self.held, completed, self._heartbeat()
            )
            if lease is None:
                return
            self.last = lease.last
            if lease.poison is not None:
                await self._record_poison(lease)
                continue
            if lease and not opened:
                opened = True
                await self._open_journal(self.memory.limits[0])
            self.held += len(lease)
            pulled += len(lease)
            self.held_bytes += sum(map(len, lease.requests))
            if not lease:
                await self._check_refusals(engine)
            self._flush_if_idle()
            rows = zip(lease.deaths or [0] * len(lease), lease.keys, lease.ids, lease.requests, strict=True)
            now = time.monotonic()
            await self.waiting.add(LeasedRow(lease.number, at, *row, now) for at, row in enumerate(rows))
            while lease.alone and self.held:
                self.rows_released.clear()
                await self.rows_released.wait()
            if lease.alone:  # durable before the next rows on trial can kill this process
                await self.flusher.flush()

    async def _slot(self, engine: Engine, slot: int) -> None:
        """One slot of the engine: takes the next row as soon as it has answered the one before."""
        while (row := await self.waiting.take()) is not None:
            self.waits.append(time.monotonic() - row.since)
            self.inside[row.key] = row
            self.memory.enter(row)
            if self.journal is not None:
                self.journal.enter(slot, row.lease, row.offset)
            began_ns = time.time_ns() if self.spans is not None else 0
            try:
                completion = await _answer(engine, row, self.config, self.recorder)
            finally:
                self.waiting.leave(row)
                self.held_bytes -= len(row.request)
                if self.journal is not None:
                    self.journal.clear(slot)
            if self.spans is not None:
                self.spans.add(row.key, row.id, began_ns, completion)
            failed = completion.error
            if failed is not None and failed.code == ErrorCode.OUT_OF_MEMORY:
                if await self._lacks_memory(row, completion, failed):
                    continue
            elif failed is None and self.memory.note_answer(engine.lowered_to):
                await self._report_memory("the engine computes fewer requests at once")
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
                self.gate.finish(row, completion)
                self.flusher.check_size()
            self.held -= 1
            self.rows_released.set()
            await self._check_refusals(engine)
            self._flush_if_idle()
            await self.waiting.share_room()
            if self.held % ROWS_WITHOUT_PAUSE == 0:
                await asyncio.sleep(0)

    async def _lacks_memory(self, row: LeasedRow, completion: Completion, failed: Failure) -> bool:
        """Lets fewer rows into the engine. True if this row is asked again, here or by another worker."""
        verdict = Verdict(True) if self.departure else self.memory.judge(row, failed, self.waiting.busy + 1)
        if verdict.departure is not None:
            await self._depart(verdict.departure)
        if verdict.halved_to is not None:
            await self._report_memory(failed.message, verdict.halved_to)
        if not verdict.again:
            return False
        self.recorder.record_tries(row, completion)
        del self.inside[row.key]
        if self.departure is None:
            self.waiting.put_back(row)
            self.held_bytes += len(row.request)
        return True

    async def _report_memory(self, reason: str, at_once: int | None = None) -> None:
        problem = ReplicaProblem(self.config.group, "memory", reason, at_once=at_once or self.memory.at_once)
        await self.dispatcher.report_problem.remote(problem)

    async def _depart(self, departure: Departure) -> None:
        """Drains for a reason that the driver will know. The first reason counts."""
        if self.departure is None:
            self.departure = departure
            self.waiting.rows.clear()
            await self.drain()

    async def _check_refusals(self, engine: Engine) -> None:
        """Stops the run if the server refuses all rows."""
        reason = self.gate.stop_reason(idle=self.last and not self.waiting.busy and not self.waiting)
        if reason is not None and engine.remote is not None:
            self.waiting.rows.clear()
            engine.remote.drain()
            await self.dispatcher.refuse.remote(str(reason), reason.code)
            await self.drain()

    async def _die(self, reason: str) -> None:
        """Ends this process, whose engine is broken, so that a new one takes its place. The rows inside the engine are
        suspects."""
        if self.dying:  # another row came first
            await asyncio.Event().wait()
        self.dying = True
        inside = _places(self.inside.values())
        await self.flusher.flush()
        if self.journal is not None:
            self.journal.close()
        await self.dispatcher.leave.remote(self.name, reason, inside)
        os._exit(1)

    async def _record_poison(self, lease: Lease) -> None:
        """Records poison rows as failed, without asking them."""
        for at, (deaths, key, id) in enumerate(zip(lease.deaths, lease.keys, lease.ids, strict=True)):
            completion = Completion(error=Failure("engine_crash", lease.poison or ""), attempts=0)
            if self.engine is not None:
                completion.cost_usd = self.engine.cost(Usage(known=False), None)
            completion.engine, completion.model = self.config.engine.kind, self.config.engine.model
            self.recorder.record(LeasedRow(lease.number, at, deaths, key, id, b""), completion)
        await self.flusher.flush()

    async def _check_budget(self, request: Request, usd: float | None) -> bool:
        row = self.inside[bytes.fromhex(request.key[:64])]  # the keys of turns and of other tries are longer
        row.charged += usd or 0.0
        room: bool = await self.dispatcher.spend_lost_try.remote(self.name, row.lease, row.offset, usd)
        return room

    def _heartbeat(self) -> ReplicaHeartbeat:
        self.reported_busy, self.reported_trouble = self.waiting.busy, _trouble(self.engine)
        return ReplicaHeartbeat() if self.engine is None else _heartbeat_of(self, self.engine)

    def _flush_if_idle(self) -> None:
        if self.held == 0 and self.last and self.recorder.records:
            self.flusher.now.set()

    async def _commit(self, places: list[tuple[int, list[int]]], counts: RunStatus) -> None:
        await self.waiting.wake_held_back()
        await self.dispatcher.commit.remote(self.name, places, counts, self._heartbeat())

    async def _after_flush(self) -> None:
        # Without this, a slow engine would seem idle until its first answers, and a wait for a server would not be shown.
        if (self.waiting.busy, _trouble(self.engine)) != (self.reported_busy, self.reported_trouble):
            await self.dispatcher.commit.remote(self.name, [], RunStatus(), self._heartbeat())
        self._report_metrics()

    def _report_metrics(self) -> None:
        if self.engine is not None:
            counts = self.engine.remote.counts if self.engine.remote is not None else {}
            self.metrics.record(self.flusher.take_written(), self.waits, counts, self.waiting.busy, len(self.waiting))
            self.waits = []


async def _answer(engine: Engine, row: LeasedRow, config: WorkerConfig, recorder: RowRecorder) -> Completion:
    """The engine's completion of a row. Only a cancellation is raised."""
    try:
        return await engine.generate(_request(row, config))
    except EngineError as error:  # a wrong setting in the row
        return Completion(error=Failure.of(error), engine=engine.kind, attempts=0)
    except asyncio.CancelledError:  # after `drain_s`: the engine may still answer and charge it
        if (cost := engine.cost(Usage(known=False), None)) is None:
            lost = Completion(error=Failure("cancelled", "the run ended before this row was answered"), cost_usd=cost)
            recorder.supersede(row, lost)
        raise
    except Exception as error:  # a bug, ours or a library's: one row must not end the run
        logger.exception("row %s: a bug", row.id)
        reason = f"a bug: {type(error).__name__}: {one_line(error)}"
        completion = Completion(error=Failure("server", reason), engine=engine.kind)
        completion.cost_usd = engine.cost(Usage(known=False), None)  # an answer may have come before the bug
        return completion


def _request(row: LeasedRow, config: WorkerConfig) -> Request:
    request = request_of(loads(row.request), config.generation, row.key)
    if config.budget:
        check_model(request, config.engine)
    return request


def _heartbeat_of(worker: Worker, engine: Engine) -> ReplicaHeartbeat:
    remote, leaving = engine.remote, worker.puller is not None and worker.puller.done()
    counts = remote.counts if remote is not None else {}
    return ReplicaHeartbeat(
        "leaving" if leaving else "working",
        worker.waiting.busy,
        worker.recorder.done,
        remote.admitted if remote is not None else None,
        min(engine.config.max_concurrency or engine.concurrency, worker.memory.at_once),
        int(counts.get("retried", 0)),
        int(counts.get("throttled", 0)),
        counts.get("limiter_wait_seconds", 0.0),
        worker.reported_trouble,
    )


def _trouble(engine: Engine | None) -> str:
    remote = engine.remote if engine is not None else None
    return remote.stall_reason if remote is not None else ""


def _places(rows: Iterable[LeasedRow]) -> list[tuple[int, int]]:
    return [(row.lease, row.offset) for row in rows]


def _close(engine: Engine, departure: Departure | None) -> None:
    try:
        engine.close()
    except Exception:
        if departure is None or departure.at_once is None:  # otherwise the engine is broken anyway
            raise


def _tune_garbage_collection() -> None:
    """Makes the collector ignore the objects of Ray, the libraries and the engine, which live as long as the process.

    Each request makes a few objects that the collector counts. Going through the hundreds of thousands of lasting objects
    again and again costs as much as the requests themselves.
    """
    gc.collect()
    collect_rarely()


async def _wait_for_puller(puller: asyncio.Task[None], others: list[asyncio.Task[None]]) -> None:
    """Waits until the puller ends, or `drain` cancels it. Raises the exception of the first task that fails."""
    done, _ = await asyncio.wait([puller, *others], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        if not task.cancelled():
            task.result()
