"""The whole run on one page: list, skip what is done, ask the rest, put the output together, commit."""

from __future__ import annotations

import contextlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson
from rich.console import Console

from engines.errors import ConfigError, ErrorCode
from engines.text import one_line
from pipeline.config import Config
from pipeline.dataset.formats import RowParser
from pipeline.dataset.keys import RequestHasher
from pipeline.dataset.plan import list_splits
from pipeline.dataset.reader import RowReader
from pipeline.errors import Stopped
from pipeline.executors.batch.runner import BatchRunner
from pipeline.executors.batch.store import BatchStore
from pipeline.executors.live.live import LedgerSnapshot, LiveExecutor, plan_reading, why_stop
from pipeline.executors.live.placement import placement
from pipeline.executors.live.ray_session import look_for_room, note_signals, running_ray
from pipeline.monitor.console import warn
from pipeline.monitor.run_state import keep_run_state
from pipeline.monitor.status import RunStatus
from pipeline.monitor.traces import run_span
from pipeline.output.manifest import make_manifest, unchanged
from pipeline.output.ownership import Ownership
from pipeline.preflight.dry_run import FIRST_S, dry_run, look_at_configuration, look_at_rows
from pipeline.report.page import write_report
from pipeline.storage.filesystem import abort_uploads, resolve, write_atomic
from pipeline.storage.lock import run_lock
from pipeline.storage.output_files import MANIFEST

OK, BUG, WRONG, WITH_FAILURES, STOPPED = 0, 1, 2, 3, 4  # and INTERRUPTED

# Rows that an engine crash or a 64-bit collision left out are asked in another pass; more passes mean a bug.
MAX_PASSES = 5


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
    row_reader = RowReader(
        RowParser(config.dataset.format, config.dataset.columns, config.dataset.template),
        RequestHasher(config.engine, config.params()),
        config.dataset.max_row_bytes,
    )
    output = Ownership.look(config, fs, root)
    if config.run.dry_run:
        rows, wrong = dry_run(config, fs, root, row_reader, list_splits(config, console), console)
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
            _remove(BatchStore(fs, root), output)
        state = stack.enter_context(keep_run_state(config, fs, root))
        batches, totals = None, RunStatus()
        if config.run.mode == "batch":
            batches = stack.enter_context(contextlib.closing(BatchRunner(config, fs, root, row_reader)))
            totals = batches.status
            state.enter("asking")
            state.source = batches.shown
            with note_signals() as interrupts:  # Ray is not needed for a day's waiting
                found = batches.ask(list_splits(config, console), console, interrupts, partial(why_stop, config), step)
            if found is None:
                state.ended = "batches are under way at the provider"
                return Outcome(STOPPED)
            summaries = found
        live = batches is None or config.run.batch_fallback == "live"
        with ThreadPoolExecutor(1) as planner:  # beside Ray's own start, which takes seconds
            planned = planner.submit(plan_reading, config, console)
            with contextlib.suppress(TimeoutError):  # of a large input it is told what is known when its turn comes
                if batches is None:
                    look_at_rows(config, planned.result(FIRST_S)[0], row_reader, check, console)
            own = stack.enter_context(running_ray())
            interrupts = stack.enter_context(note_signals())  # after Ray, which sets handlers of its own
            splits, small = planned.result()
        trace = span.trace if span else None
        steps = LiveExecutor(config, console, fs, root, row_reader, placed, trace, state, interrupts, splits, small, output)
        if live:
            look_for_room(placed, own, console)
        from ray.exceptions import RayActorError

        failed_too = batches is not None or not config.run.retry_failed
        known = LedgerSnapshot(config, failed_too=failed_too)
        for path in known.index.torn:
            warn(console, f"{path} cannot be read; its rows are asked again.")
        missing = sys.maxsize
        for again in range(MAX_PASSES):
            if live:
                try:
                    status, summaries = steps.ask(known)
                except RayActorError as error:  # the dispatcher died, with its node say; the ledger has all that matters
                    warn(console, f"The dispatcher died; going on from the ledger. {one_line(error)}")
                    known = LedgerSnapshot(config, failed_too=failed_too)
                    continue
                totals.done += status.done
                totals.failed += status.failed
                totals.crashes += status.crashes
            elif again and batches is not None:
                summaries = batches.ask(splits, console, interrupts, partial(why_stop, config), "") or summaries
            snapshot = known = LedgerSnapshot(config)  # in place of what the feed skipped, which is given up
            index = snapshot.index
            if not totals.done + totals.failed and (manifest := unchanged(config, fs, root, splits, index)) is not None:
                console.print("Nothing new to ask: the output is up to date.", highlight=False)
                return Outcome(_exit_status(manifest), manifest)
            state.enter("putting the output together")
            result = steps.finalize(summaries, snapshot)
            if not result.missing:
                break
            if result.missing >= missing:
                text = f"{result.missing:,} rows have no answer though they were asked: do all nodes see {root}?"
                raise Stopped(text, code=ErrorCode.ROWS_MISSING)
            missing = result.missing
            console.print(f"{missing:,} rows have no answer yet; asking them.", highlight=False)
        else:
            text = f"rows are still missing after {MAX_PASSES} passes; the same command goes on from here"
            raise Stopped(text, code=ErrorCode.ROWS_MISSING)
        manifest = make_manifest(config, splits, fs, summaries, result, index, totals, started)
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


def _remove(book: BatchStore, output: Ownership) -> None:
    """Clears what earlier runs left, and nothing else."""
    if under_way := [batch.id or batch.name for batch in book.open]:
        raise ConfigError(
            f"run.resume=false would forget {len(under_way)} batches under way ({under_way[0]}, …): "
            "wait for them, or end them with eagleray batch cancel",
            code=ErrorCode.BATCHES_UNDER_WAY,
        )
    output.clear()
    for batch in list(book.batches):
        book.forget(batch)
    book.sweep()
