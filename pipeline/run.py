"""The whole run on one page: list, skip what is done, ask the rest, put the output together, commit."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import orjson
import pyarrow.fs as pafs
from rich.console import Console

from engines.base import EngineConfig
from engines.text import one_line
from engines.types import ConfigError, EaglerayError
from pipeline.batches import BatchRun, Book
from pipeline.budget import Budget, old_costs, spent_so_far
from pipeline.config import Config
from pipeline.crew import Crew, Interrupted, Stopped
from pipeline.executors.live.dispatcher import Dispatcher
from pipeline.feed import Interpreter, Piece, Status, Summary
from pipeline.finalize import OPTIONAL, Job, JobResult, PartWriter, part_names, plan_columns, plan_jobs
from pipeline.formats import RowParser
from pipeline.fs import abort_uploads, exists, info_of, listing, resolve, write_atomic
from pipeline.keys import Keyer
from pipeline.ledger import FarIndex, Index, Lookup, read_index
from pipeline.limiter import limiter
from pipeline.lock import run_lock
from pipeline.manifest import make_manifest, unchanged
from pipeline.ownership import Ownership
from pipeline.placement import Placement, placement, spread
from pipeline.preflight import FIRST_S, dry_run, look_at_configuration, look_at_rows
from pipeline.progress import RunProgress
from pipeline.recognise import MANIFEST, SEGMENTS
from pipeline.report import write_report
from pipeline.scores import score_columns
from pipeline.session import INTERRUPTED, PATIENCE_S, here, look_for_room, note_signals, running_ray, warn
from pipeline.source import list_chunks, read_chunk
from pipeline.state import RunState, told
from pipeline.traces import Trace, run_span
from pipeline.worker import Worker, WorkerConfig

__all__ = ["INTERRUPTED", "Interrupted", "Outcome", "list_pieces", "run"]

OK, BUG, WRONG, WITH_FAILURES, STOPPED = 0, 1, 2, 3, 4  # and INTERRUPTED

# Rows that an engine crash or a 64-bit collision left out are asked in another pass; more passes mean a bug.
MAX_PASSES = 5
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


@dataclass(slots=True)
class Outcome:
    """What a run came to."""

    exit_status: int
    manifest: dict[str, Any] = field(default_factory=dict)


def run(config: Config, console: Console, step: str = "") -> Outcome:
    """Runs the main job. Raises `ConfigError`, `Stopped` or `Interrupted`; any other exception is a bug.

    After a `step` of "submit" or "fetch", where batches are still under way, the status is `STOPPED`, with no manifest.
    """
    config.check()
    placed = placement(config.hardware, config.engine)
    fs, root = resolve(str(config.output.path))
    interpreter = Interpreter(
        RowParser(config.dataset.format, config.dataset.columns, config.dataset.template),
        Keyer(config.engine, config.params()),
        config.dataset.max_row_bytes,
    )
    output = Ownership.look(config, fs, root)
    if config.run.dry_run:
        rows, wrong = dry_run(config, fs, root, interpreter, list_pieces(config, console), console)
        return Outcome(WRONG if wrong else WITH_FAILURES if rows.bad else OK)
    check = look_at_configuration(config, fs, root, console)
    with contextlib.ExitStack() as stack:
        span = stack.enter_context(run_span(config.run.traces, config.engine, console))
        output.begin()
        stack.enter_context(run_lock(fs, root))
        output = Ownership.look(config, fs, root)  # again: another run may have ended between
        output.settle()
        started = time.time()
        if not config.run.resume:
            _remove(Book(fs, root), output)
        state = stack.enter_context(told(config, fs, root))
        batches, asked = None, Status()
        if config.run.mode == "batch":
            batches = stack.enter_context(contextlib.closing(BatchRun(config, fs, root, interpreter)))
            asked = batches.status
            state.enter("asking")
            state.source = batches.shown
            with note_signals() as interrupts:  # Ray is not needed for a day's waiting
                found = batches.ask(list_pieces(config, console), console, interrupts, partial(_why_stop, config), step)
            if found is None:
                state.ended = "batches are under way at the provider"
                return Outcome(STOPPED)
            summaries = found
        live = batches is None or config.run.batch_fallback == "live"
        with ThreadPoolExecutor(1) as planner:  # beside Ray's own start, which takes seconds
            planned = planner.submit(_plan, config, console)
            with contextlib.suppress(TimeoutError):  # of a large input it is told what is known when its turn comes
                if batches is None:
                    look_at_rows(config, planned.result(FIRST_S)[0], interpreter, check, console)
            own = stack.enter_context(running_ray())
            interrupts = stack.enter_context(note_signals())  # after Ray, which sets handlers of its own
            pieces, small = planned.result()
        trace = span.trace if span else None
        steps = _Steps(config, console, fs, root, interpreter, placed, trace, state, interrupts, pieces, small, output)
        if live:
            look_for_room(placed, own, console)
        from ray.exceptions import RayActorError

        failed_too = batches is not None or not config.run.retry_failed
        known = Answers(config, failed_too=failed_too)
        for path in known.index.torn:
            warn(console, f"{path} cannot be read; its rows are asked again.")
        missing = sys.maxsize
        for again in range(MAX_PASSES):
            if live:
                try:
                    status, summaries = steps.ask(known)
                except RayActorError as error:  # the dispatcher died, with its node say; the ledger has all that matters
                    warn(console, f"The dispatcher died; going on from the ledger. {one_line(error)}")
                    known = Answers(config, failed_too=failed_too)
                    continue
                asked.done += status.done
                asked.failed += status.failed
                asked.crashes += status.crashes
            elif again and batches is not None:
                summaries = batches.ask(pieces, console, interrupts, partial(_why_stop, config), "") or summaries
            answers = known = Answers(config)  # in place of what the feed skipped, which is given up
            index = answers.index
            if not asked.done + asked.failed and (manifest := unchanged(config, fs, root, pieces, index)) is not None:
                console.print("Nothing new to ask: the output is up to date.", highlight=False)
                return Outcome(_exit_status(manifest), manifest)
            state.enter("putting the output together")
            result = steps.finalize(summaries, answers)
            if not result.missing:
                break
            if result.missing >= missing:
                raise Stopped(f"{result.missing:,} rows have no answer though they were asked: do all nodes see {root}?")
            missing = result.missing
            console.print(f"{missing:,} rows have no answer yet; asking them.", highlight=False)
        else:
            raise Stopped(f"rows are still missing after {MAX_PASSES} passes; the same command goes on from here")
        manifest = make_manifest(config, pieces, fs, summaries, result, index, asked, started)
        if span is not None:
            span.rows(manifest["rows"])
        output.drop_stale(result.files)
        abort_uploads(str(config.output.path), output.is_own)
        write_report(fs, root, manifest, result.stats, console)
        write_atomic(fs, f"{root}/{MANIFEST}", orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
        output.commit(result.files)
        return Outcome(_exit_status(manifest), manifest)


def _exit_status(manifest: dict[str, Any]) -> int:
    return WITH_FAILURES if manifest["rows"]["failed"] else OK


# -- before -----------------------------------------------------------------------------------------------------------


class Answers:
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
            lookup = ray.remote(Lookup).options(num_cpus=0, scheduling_strategy=here())
            self.near = [self.ref]
            self.ref = ray.put(FarIndex(lookup.remote(self.near), self.index.paths))


def _read_index(path: str, failed_too: bool, engine: EngineConfig) -> Index:
    return read_index(*resolve(path), old_costs(engine)).only(failed_too=failed_too)


def _plan(config: Config, console: Console) -> tuple[list[Piece], bool]:
    """The pieces, and whether they are so small that no other process is started to read them."""
    pieces = list_pieces(config, console)
    few = list(dict.fromkeys(piece.chunk.file for piece in pieces))[: SMALL_FILES + 1]
    small = len(few) <= SMALL_FILES and sum(info_of(*resolve(name)).size for name in few) <= SMALL_BYTES
    return pieces, small


def list_pieces(config: Config, console: Console) -> list[Piece]:
    """What is to be read, in its order."""
    dataset = config.dataset
    chunks = list_chunks(dataset.path, chunk_bytes=dataset.chunk_bytes, on_bad_input=dataset.on_bad_input)
    for chunk in chunks:
        if chunk.kind == "bad":
            warn(console, f"{chunk.name}: {chunk.reason}; it becomes one error row.")
    pieces: list[Piece] = []
    left = dataset.limit
    for chunk in chunks:
        if left is None:
            pieces.append(Piece(len(pieces), chunk))
        elif left > 0:
            rows = 0
            for batch in read_chunk(chunk, max_row_bytes=dataset.max_row_bytes):
                rows += len(batch)
                if rows >= left:
                    break
            pieces.append(Piece(len(pieces), chunk, min(rows, left)))
            left -= min(rows, left)
    return pieces


def _remove(book: Book, output: Ownership) -> None:
    """Clears what earlier runs left, and nothing else."""
    if under_way := [batch.id or batch.name for batch in book.open]:
        raise ConfigError(
            f"run.resume=false would forget {len(under_way)} batches under way ({under_way[0]}, …): "
            "wait for them, or end them with eagleray batch cancel"
        )
    output.clear()
    for batch in list(book.batches):
        book.forget(batch)
    book.sweep()


# -- asking, and putting together --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Steps:
    """Asking and putting together, and what both need."""

    config: Config
    console: Console
    fs: pafs.FileSystem
    root: str
    interpreter: Interpreter
    placed: Placement
    trace: Trace | None
    state: RunState
    interrupts: list[int]
    pieces: list[Piece]
    small: bool  # no other process is started to read them
    output: Ownership

    def ask(self, known: Answers) -> tuple[Status, dict[int, Summary]]:
        """Feeds all rows that `known` does not have to the workers, until every one of them is durable."""
        import ray

        config, console, state, budget = self.config, self.console, self.state, None
        if (limit := config.run.budget_usd) is not None:
            spent = spent_so_far(config.engine, config.params(), known.index, self.fs, self.root)
            budget = Budget(limit, config.engine, config.params(), spent)
        fail = config.dataset.on_bad_input == "fail"
        # In a list, so that the reference itself arrives: only the read tasks look into it.
        done = [known.ref]
        beside = ray.remote(Dispatcher).options(num_cpus=0, scheduling_strategy=here())
        dispatcher = beside.remote(self.pieces, self.interpreter, done, fail, self.small, budget, str(config.output.path))
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
        crew = Crew(ray.remote(Worker), worker, self.placed, dispatcher, config.run.max_engine_deaths)
        reads = dispatcher.start.remote(dispatcher.report, 8 * 1024)
        # Held here: Ray ends an actor with whoever made it.
        limits = limiter(config.engine) if config.engine.provider else None
        state.enter("asking")
        state.source = None
        said = False
        finished, refused = 0, 0  # rows done, and refused for the key, when a row was last done
        failure: EaglerayError | None = None  # of a replica; the others still commit what they have
        why, ends_by = "", math.inf
        broke: Stopped | None = None
        began = time.monotonic()
        try:
            crew.start()
            ray.get(reads)
            with RunProgress(console, config.run.progress_s, config.engine, config.run.budget_usd) as progress:
                while True:
                    status: Status = ray.get(dispatcher.status.remote())
                    state.status = status
                    progress.show(status, len(crew.replicas))
                    try:
                        crew.tend(status)
                    except EaglerayError as error:
                        failure = failure or error
                    said = said or status.workers > 0
                    if not said and time.monotonic() - began > PATIENCE_S:
                        said = True
                        wish = self.placed.wish()
                        warn(console, f"No replica works yet: each asks for {wish}, and may be loading its model.")
                    if status.done > finished:
                        finished, refused = status.done, status.errors["auth"]
                    reason = _why_stop(config, status, status.errors["auth"] - refused) or (
                        "Interrupted" if self.interrupts else failure and str(failure)
                    )
                    if status.broke and budget is not None and not reason:
                        budget.spent, more = status.spent, "" if status.fed else " and those that are not read yet"
                        broke = Stopped(budget.told(f"{status.left:,} rows{more} are left"), budget.higher)
                        reason = str(broke)
                    if reason and not why:
                        why, ends_by = reason, time.monotonic() + config.run.drain_s + GRACE_S
                        if status.in_flight:
                            again = " (a second time ends at once)" if self.interrupts else ""
                            warn(console, f"{why}: finishing {status.in_flight} rows in flight{again}.")
                        ray.get(dispatcher.stop.remote())
                        crew.drain()
                    if (status.finished and not status.workers) or time.monotonic() > ends_by:
                        break
                    time.sleep(0.05 if status.finished else 0.2)
            state.status = status = ray.get(dispatcher.status.remote())
            ray.get(dispatcher.settle.remote())
            summaries = ray.get(dispatcher.take_summaries.remote())
        finally:
            crew.dismiss()
            ray.kill(dispatcher)
            del limits
        if status.broken is not None:
            raise Stopped(f"reading the input failed: {status.broken}")
        if failure is not None:
            raise failure
        if why:
            if self.interrupts:
                raise Interrupted("interrupted; everything finished is kept, the same command goes on from here")
            raise broke or Stopped(f"{why}; everything finished is kept, the same command goes on from here")
        return status, summaries

    def finalize(self, summaries: dict[int, Summary], answers: Answers) -> JobResult:
        """Writes data/ and errors/ on all nodes at once."""
        from ray.exceptions import RayError, RayTaskError

        config, interpreter = self.config, self.interpreter
        jobs, total = plan_jobs(self.pieces, summaries), JobResult()
        if foreign := self.output.intend(part_names(jobs, config.output.format)):
            raise Stopped(f"{self.output.in_the_way(foreign)}; the same command goes on from here")
        if exists(self.fs, f"{self.root}/{MANIFEST}"):  # until it is written again, no reader may trust the files
            self.fs.delete_file(f"{self.root}/{MANIFEST}")
        scores = score_columns(config.output.columns, config.params().response_format)
        columns = plan_columns(self.pieces, summaries, interpreter, scores)
        params = set(config.params().given()).union(*(summary.params for summary in summaries.values()))
        optional = [name for name, param in OPTIONAL.items() if param in params]
        raw = any(summary.invalid for summary in summaries.values())
        writer = PartWriter(interpreter, columns, optional, raw, config.output, scores)
        used = np.zeros(len(answers.index), np.bool_)
        with self.console.status("putting the output together"):
            try:
                for result in _written(writer, jobs, answers, self.small and answers.small, self.interrupts):
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
                raise Stopped(f"putting the output together failed: {one_line(cause)}; the same command goes on") from None
        total.used = [used]
        return total


def _why_stop(config: Config, status: Status, refused: int = 0) -> str | None:
    """The reason to stop early, or None. `refused` rows failed for the key, with none done between."""
    failed, finished = status.failed + status.invalid, status.done + status.failed
    example = next(iter(status.first_errors.values()), "")
    if refused >= (REFUSALS_TO_STOP if status.done else 1):
        return f"the provider refuses the key ({status.first_errors['auth']})"
    if config.run.max_errors is not None and failed >= config.run.max_errors:
        return f"{failed} rows failed, run.max_errors is {config.run.max_errors} (one of them: {example})"
    rate = config.run.max_error_rate
    if rate is not None and finished >= RATE_NEEDS_ROWS and status.failed > rate * finished:
        return f"{status.failed} of {finished} rows failed, run.max_error_rate is {rate} (one of them: {example})"
    if rate is not None and status.read >= RATE_NEEDS_ROWS and status.invalid > rate * status.read:
        return f"{status.invalid} of {status.read} rows cannot be read, run.max_error_rate is {rate}"
    return None


def _written(
    writer: PartWriter, jobs: list[Job], answers: Answers, here: bool, interrupts: list[int]
) -> Iterator[JobResult]:
    import ray

    if here:
        yield from (writer.run(job, answers.index) for job in jobs)
        return
    shared = ray.put(writer)
    do = ray.remote(num_cpus=1, max_retries=3, retry_exceptions=[OSError])(_do_job)
    waiting = [do.remote(shared, answers.ref, job) for job in jobs]
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.5)
        if interrupts:
            raise Interrupted("interrupted while putting the output together; the same command does it again")
        yield from ray.get(done)


def _do_job(writer: PartWriter, answers: Index | FarIndex, job: Job) -> JobResult:
    return writer.run(job, answers)
