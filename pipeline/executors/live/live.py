"""Runs the live executor: starts the dispatcher and the replicas, waits, and writes the output."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.fs as pafs
from rich.console import Console

from engines.config import EngineConfig
from engines.errors import EaglerayError, ErrorCode
from engines.text import one_line
from pipeline.config import Config
from pipeline.dataset.plan import list_splits
from pipeline.dataset.reader import ReadSplit, RowReader, SplitSummary
from pipeline.errors import Interrupted, Stopped
from pipeline.executors.cost_budget import CostBudget, spent_so_far
from pipeline.executors.live.dispatcher import Dispatcher
from pipeline.executors.live.placement import Placement, spread
from pipeline.executors.live.rate_limiter import rate_limit_actor
from pipeline.executors.live.ray_session import PATIENCE_S, here
from pipeline.executors.live.replicas import ReplicaPool
from pipeline.executors.live.worker import Worker, WorkerConfig
from pipeline.monitor.console import warn
from pipeline.monitor.progress import RunProgress
from pipeline.monitor.run_state import RunState
from pipeline.monitor.status import RunStatus
from pipeline.monitor.traces import Trace
from pipeline.output.answer_columns import plan_answer_columns
from pipeline.output.cost import old_costs
from pipeline.output.finalize import OPTIONAL, Job, JobResult, PartWriter, part_names, plan_columns, plan_jobs
from pipeline.output.ownership import Ownership
from pipeline.storage.filesystem import exists, info_of, listing, resolve
from pipeline.storage.ledger_index import Index, IndexActor, RemoteIndex, read_index
from pipeline.storage.output_files import MANIFEST, SEGMENTS

# A drain has `run.drain_s`, and this long to write and leave.
GRACE_S = 20.0
# A key that worked may be out of money, or expired: so many refusals in a row end the run.
REFUSALS_TO_STOP = 20
# Up to so much is read here and now: a process for it takes seconds to start.
SMALL_FILES, SMALL_BYTES = 8, 8 << 20
# A larger index stays on the driver's node and is asked, where there are others.
FAR_ROWS = 100_000
# `max_error_rate` says nothing about the first few rows.
RATE_NEEDS_ROWS = 100


class LedgerSnapshot:
    """What the ledger has. A large one is read in a task beside the driver: its arrays lie in shared memory, and the driver
    stays small."""

    def __init__(self, config: Config, *, failed_too: bool = True) -> None:
        import ray

        where = resolve(str(config.output.path))
        self.small = sum(info.size or 0 for info in listing(where[0], f"{where[1]}/{SEGMENTS}")) <= SMALL_BYTES
        if self.small:
            self.index = _read_index(str(config.output.path), failed_too, config.engine)
            self.ref = ray.put(self.index)
        else:
            read = ray.remote(num_cpus=0, max_retries=3, scheduling_strategy=here())(_read_index)
            self.ref = read.remote(str(config.output.path), failed_too, config.engine)
            self.index = ray.get(self.ref)
        if len(self.index) > FAR_ROWS and len(ray.nodes()) > 1:
            index_actor = ray.remote(IndexActor).options(num_cpus=0, scheduling_strategy=here())
            self.near = [self.ref]
            self.ref = ray.put(RemoteIndex(index_actor.remote(self.near), self.index.paths))


def _read_index(path: str, failed_too: bool, engine: EngineConfig) -> Index:
    return read_index(*resolve(path), old_costs(engine)).only(failed_too=failed_too)


def plan_reading(config: Config, console: Console) -> tuple[list[ReadSplit], bool]:
    """The splits, and whether they are so small that no other process is started to read them."""
    splits = list_splits(config, console)
    few = list(dict.fromkeys(split.file_split.file for split in splits))[: SMALL_FILES + 1]
    small = len(few) <= SMALL_FILES and sum(info_of(*resolve(name)).size for name in few) <= SMALL_BYTES
    return splits, small


@dataclass(slots=True)
class LiveExecutor:
    """Asking and putting together, and what both need."""

    config: Config
    console: Console
    fs: pafs.FileSystem
    root: str
    row_reader: RowReader
    placed: Placement
    trace: Trace | None
    state: RunState
    interrupts: list[int]
    splits: list[ReadSplit]
    small: bool  # no other process is started to read them
    output: Ownership

    def ask(self, known: LedgerSnapshot) -> tuple[RunStatus, dict[int, SplitSummary]]:
        """Feeds all rows that `known` does not have to the workers, until every one of them is durable."""
        import ray

        config, console, state, budget = self.config, self.console, self.state, None
        if (limit := config.run.budget_usd) is not None:
            spent = spent_so_far(config.engine, config.params(), known.index, self.fs, self.root)
            budget = CostBudget(limit, config.engine, config.params(), spent)
        fail = config.dataset.on_bad_input == "fail"
        # In a list, so that the reference itself arrives: only the read tasks look into it.
        done = [known.ref]
        beside = ray.remote(Dispatcher).options(num_cpus=0, scheduling_strategy=here())
        dispatcher = beside.remote(self.splits, self.row_reader, done, fail, self.small, budget, str(config.output.path))
        worker = WorkerConfig(
            engine=spread(config.engine, self.placed),
            generation=config.params(),
            output_path=str(config.output.path),
            flush_s=config.run.flush_s,
            drain_s=config.run.drain_s,
            max_outage_s=config.run.max_outage_s,
            cpus=config.hardware.cpus,
            trace=self.trace,
            budget=budget is not None,
        )
        replica_pool = ReplicaPool(ray.remote(Worker), worker, self.placed, dispatcher, config.run.max_engine_deaths)
        reads = dispatcher.start.remote(dispatcher.report, 8 * 1024)
        # Held here: Ray ends an actor with whoever made it.
        limits = rate_limit_actor(config.engine) if config.engine.provider else None
        state.enter("asking")
        state.source = None
        said = False
        finished, refused = 0, 0  # rows done, and refused for the key, when a row was last done
        failure: EaglerayError | None = None  # of a replica; the others still commit what they have
        why, code, ends_by = "", str(ErrorCode.STOPPED), math.inf
        broke: Stopped | None = None
        began = time.monotonic()
        try:
            replica_pool.start()
            ray.get(reads)
            with RunProgress(console, config.run.progress_s, config.engine, config.run.budget_usd) as progress:
                while True:
                    status: RunStatus = ray.get(dispatcher.status.remote())
                    state.status = status
                    progress.show(status, len(replica_pool.replicas))
                    try:
                        replica_pool.maintain(status)
                    except EaglerayError as error:
                        failure = failure or error
                    said = said or status.workers > 0
                    if not said and time.monotonic() - began > PATIENCE_S:
                        said = True
                        wish = self.placed.wish()
                        warn(console, f"No replica works yet: each asks for {wish}, and may be loading its model.")
                    if status.done > finished:
                        finished, refused = status.done, status.errors["auth"]
                    stop: EaglerayError | None = why_stop(config, status, status.errors["auth"] - refused)
                    if stop is None and not self.interrupts:
                        stop = failure
                    reason = str(stop) if stop else "Interrupted" if self.interrupts else ""
                    if status.broke and budget is not None and not reason:
                        budget.spent, more = status.spent, "" if status.fed else " and those that are not read yet"
                        text = budget.summary(f"{status.left:,} rows{more} are left")
                        broke = Stopped(text, budget.higher, code=ErrorCode.BUDGET_SPENT)
                        reason = str(broke)
                    if reason and not why:
                        why, ends_by = reason, time.monotonic() + config.run.drain_s + GRACE_S
                        code = stop.code if stop else code
                        if status.in_flight:
                            again = " (a second time ends at once)" if self.interrupts else ""
                            warn(console, f"{why}: finishing {status.in_flight} rows in flight{again}.")
                        ray.get(dispatcher.stop.remote())
                        replica_pool.drain()
                    if (status.finished and not status.workers) or time.monotonic() > ends_by:
                        break
                    time.sleep(0.05 if status.finished else 0.2)
            state.status = status = ray.get(dispatcher.status.remote())
            ray.get(dispatcher.settle.remote())
            summaries = ray.get(dispatcher.take_summaries.remote())
        finally:
            replica_pool.stop_all()
            ray.kill(dispatcher)
            del limits
        if status.broken is not None:
            raise Stopped(f"reading the input failed: {status.broken}", code=ErrorCode.INPUT_UNREADABLE)
        if failure is not None:
            raise failure
        if why:
            if self.interrupts:
                raise Interrupted("interrupted; everything finished is kept, the same command goes on from here")
            text = f"{why}; everything finished is kept, the same command goes on from here"
            raise broke or Stopped(text, code=code)
        return status, summaries

    def finalize(self, summaries: dict[int, SplitSummary], snapshot: LedgerSnapshot) -> JobResult:
        """Writes data/ and errors/ on all nodes at once."""
        from ray.exceptions import RayError, RayTaskError

        config, row_reader = self.config, self.row_reader
        jobs, total = plan_jobs(self.splits, summaries), JobResult()
        if foreign := self.output.intend(part_names(jobs, config.output.format)):
            text = f"{self.output.in_the_way(foreign)}; the same command goes on from here"
            raise Stopped(text, code=ErrorCode.FILE_IN_THE_WAY)
        if exists(self.fs, f"{self.root}/{MANIFEST}"):  # until it is written again, no reader may trust the files
            self.fs.delete_file(f"{self.root}/{MANIFEST}")
        answer_columns = plan_answer_columns(config.output.columns, config.params().response_format)
        columns = plan_columns(self.splits, summaries, row_reader, answer_columns)
        params = set(config.params().given()).union(*(summary.params for summary in summaries.values()))
        optional = [name for name, param in OPTIONAL.items() if param in params]
        raw = any(summary.invalid for summary in summaries.values())
        writer = PartWriter(row_reader, columns, optional, raw, config.output, answer_columns)
        used = np.zeros(len(snapshot.index), np.bool_)
        with self.console.status("putting the output together"):
            try:
                for result in _written(writer, jobs, snapshot, self.small and snapshot.small, self.interrupts):
                    total.rows += result.rows
                    total.failed += result.failed
                    total.missing += result.missing
                    total.errors.update(result.errors)
                    total.files.update(result.files)
                    for positions in result.used:
                        used[positions] = True
                    total.stats.merge(result.stats)
            except (OSError, RayError) as error:
                cause = getattr(error, "cause", error)
                if isinstance(error, RayTaskError) and not isinstance(cause, OSError):
                    raise
                # Else the store failed, or Ray ended a process, for want of memory say.
                text = f"putting the output together failed: {one_line(cause)}; the same command goes on"
                raise Stopped(text, code=ErrorCode.STORE_FAILED) from None
        total.used = [used]
        return total


def why_stop(config: Config, status: RunStatus, refused: int = 0) -> Stopped | None:
    """The reason to stop early, or None. `refused` rows in a row failed because the provider refused the key."""
    too_many = functools.partial(Stopped, code=ErrorCode.TOO_MANY_ERRORS)
    failed, finished = status.failed + status.invalid, status.done + status.failed
    example = next(iter(status.first_errors.values()), "")
    if refused >= (REFUSALS_TO_STOP if status.done else 1):
        return Stopped(f"the provider refuses the key ({status.first_errors['auth']})", code=ErrorCode.KEY_REFUSED)
    if config.run.max_errors is not None and failed >= config.run.max_errors:
        return too_many(f"{failed} rows failed, run.max_errors is {config.run.max_errors} (one of them: {example})")
    rate = config.run.max_error_rate
    if rate is not None and finished >= RATE_NEEDS_ROWS and status.failed > rate * finished:
        return too_many(f"{status.failed} of {finished} rows failed, run.max_error_rate is {rate} (one of them: {example})")
    if rate is not None and status.read >= RATE_NEEDS_ROWS and status.invalid > rate * status.read:
        return too_many(f"{status.invalid} of {status.read} rows cannot be read, run.max_error_rate is {rate}")
    return None


def _written(
    writer: PartWriter, jobs: list[Job], snapshot: LedgerSnapshot, here: bool, interrupts: list[int]
) -> Iterator[JobResult]:
    import ray

    if here:
        yield from (writer.run(job, snapshot.index) for job in jobs)
        return
    shared = ray.put(writer)
    do = ray.remote(num_cpus=1, max_retries=3, retry_exceptions=[OSError])(_run_job)
    waiting = [do.remote(shared, snapshot.ref, job) for job in jobs]
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.5)
        if interrupts:
            raise Interrupted("interrupted while putting the output together; the same command does it again")
        yield from ray.get(done)


def _run_job(writer: PartWriter, snapshot: Index | RemoteIndex, job: Job) -> JobResult:
    return writer.run(job, snapshot)
