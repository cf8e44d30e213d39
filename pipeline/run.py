"""A run in its phases: resolve, lock, preflight, execute, finalize, commit."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import orjson
from rich.console import Console

from pipeline.config import Config
from pipeline.context import RunContext, resolve_context
from pipeline.dataset.plan import SplitInput, list_splits, split_input
from pipeline.executors import registry
from pipeline.executors.base import Executor
from pipeline.monitor.run_state import keep_run_state
from pipeline.monitor.traces import run_span
from pipeline.output.manifest import make_manifest
from pipeline.output.ownership import Ownership
from pipeline.passes import Passes, run_passes
from pipeline.preflight.dataset_estimate import Check
from pipeline.preflight.dry_run import FIRST_S, dry_run, look_at_configuration, look_at_rows
from pipeline.report.page import write_report
from pipeline.storage.filesystem import abort_uploads, write_atomic
from pipeline.storage.lock import run_lock
from pipeline.storage.output_files import MANIFEST

OK, BUG, WRONG, WITH_FAILURES, STOPPED = 0, 1, 2, 3, 4  # and INTERRUPTED in pipeline/signals.py


@dataclass(slots=True)
class Outcome:
    """The result of a run."""

    exit_status: int
    manifest: dict[str, Any] = field(default_factory=dict)


def run(config: Config, console: Console, step: str = "") -> Outcome:
    """Runs the main job. Raises `ConfigError`, `Stopped` or `Interrupted`. Any other exception is a bug.

    A `step` is "submit" or "fetch" of `eagleray batch`. If work goes on elsewhere after it, the status is `STOPPED` and
    there is no manifest.
    """
    context = resolve_context(config, console, step)
    if config.run.dry_run:
        return _dry_run(context)
    check = look_at_configuration(config, context.fs, context.root, console)
    with context.stack:
        _lock(context)
        executors = registry.executors_for(context)
        inputs = _preflight(context, executors[0], check)
        passes = run_passes(context, executors, inputs)  # execute and finalize
        return _commit(context, inputs, passes)


def _dry_run(context: RunContext) -> Outcome:
    splits = list_splits(context.config, context.console)
    rows, wrong = dry_run(context.config, context.fs, context.root, context.row_reader, splits, context.console)
    return Outcome(WRONG if wrong else WITH_FAILURES if rows.bad else OK)


def _lock(context: RunContext) -> None:
    """Makes the output this run's own, until the end of the run."""
    config, stack = context.config, context.stack
    context.span = stack.enter_context(run_span(config.run.traces, config.engine, context.console))
    context.ownership.begin()
    stack.enter_context(run_lock(context.fs, context.root))
    # Again, because another run may have ended between the first look and the lock.
    context.ownership = Ownership.look(config, context.fs, context.root)
    context.ownership.settle()
    if not config.run.resume:
        registry.clear(context)
        context.ownership.clear()
    context.state = stack.enter_context(keep_run_state(config, context.fs, context.root))


def _preflight(context: RunContext, first: Executor, check: Check | None) -> SplitInput:
    """Lists the input, and prints what its first rows tell. Meanwhile the first executor starts what takes long."""
    with ThreadPoolExecutor(1) as planner:
        planned = planner.submit(split_input, context.config, context.console)
        with contextlib.suppress(TimeoutError):  # a large input takes longer to list: nothing is printed of it
            inputs = planned.result(FIRST_S)
            look_at_rows(context.config, inputs.splits, context.row_reader, check, context.console)
        first.prepare()
        return planned.result()


def _commit(context: RunContext, inputs: SplitInput, passes: Passes) -> Outcome:
    """Writes the report and, last, the manifest, with which the output is complete."""
    fs, root = context.fs, context.root
    if passes.unfinished is not None:
        context.state.ended = passes.unfinished
        return Outcome(STOPPED)
    if passes.current is not None:
        context.console.print("Nothing new to ask: the output is up to date.", highlight=False)
        return Outcome(_exit_status(passes.current), passes.current)
    assert passes.written is not None
    written, more = passes.written, registry.manifest_entries(context)
    manifest = make_manifest(context, inputs.splits, passes.summaries, written, passes.index, passes.totals, more)
    if context.span is not None:
        context.span.rows(manifest["rows"])
    context.ownership.drop_stale(written.files)
    abort_uploads(context.output_path, context.ownership.may_upload)
    write_report(fs, root, manifest, written.stats, context.console)
    write_atomic(fs, f"{root}/{MANIFEST}", orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    context.ownership.commit(written.files)
    return Outcome(_exit_status(manifest), manifest)


def _exit_status(manifest: dict[str, Any]) -> int:
    return WITH_FAILURES if manifest["rows"]["failed"] else OK
