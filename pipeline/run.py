"""A run in its phases: resolve, preflight, lock, execute, finalize, commit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson
from rich.console import Console

from pipeline.config import Config
from pipeline.context import RunContext, resolve_context
from pipeline.dataset.plan import SplitInput, list_splits, split_input
from pipeline.errors import Interrupted, Stopped
from pipeline.executors import registry
from pipeline.monitor.progress import phase_line, show_counts
from pipeline.monitor.run_state import keep_run_state
from pipeline.monitor.traces import run_span
from pipeline.origin import Origin
from pipeline.output.manifest import make_manifest, this_run
from pipeline.output.ownership import Ownership
from pipeline.output.table_append import append_rows, clear_tables
from pipeline.output.up_to_date import stamps_entry
from pipeline.passes import Passes, run_passes
from pipeline.preflight.dataset_estimate import Check
from pipeline.preflight.dry_run import dry_run, look_at_configuration, look_at_rows
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


def run(
    config: Config, console: Console, step: str = "", origin: Origin | None = None, *, in_program: bool = False
) -> Outcome:
    """Runs the main job. Raises `ConfigError`, `Stopped` or `Interrupted`. Any other exception is a bug.

    A `step` is "submit" or "fetch" of `eagleray batch`. If batches are still at the provider after it, the status is
    `STOPPED` and there is no manifest. The manifest keeps the `origin` of the run. `in_program`: see `Interrupts`.
    """
    context = resolve_context(config, console, step, origin, in_program=in_program)
    if config.run.dry_run:
        return _dry_run(context)
    with phase_line(console, "checking the configuration", in_log=False):
        check = look_at_configuration(context)
    with context.stack:
        executors = registry.executors_for(context)
        executors[0].begin()
        inputs = _list(context, check)
        _lock(context)
        if context.piped is not None:
            inputs.splits = context.piped.keep(context.fs, context.root, context.output_path, inputs.splits)
        try:
            passes = run_passes(context, executors, inputs)  # execute and finalize
            outcome = _commit(context, inputs, passes)
        except (Stopped, Interrupted):
            show_counts(console, context.state.now)
            raise
        if not outcome.manifest:
            show_counts(console, context.state.now)
        return outcome


def _dry_run(context: RunContext) -> Outcome:
    splits = list_splits(context.config, context.console, context.piped)
    rows, wrong = dry_run(context, splits)
    return Outcome(WRONG if wrong else WITH_FAILURES if rows.bad else OK)


def _list(context: RunContext, check: Check | None) -> SplitInput:
    """Lists the input, and checks its first rows. Writes nothing. Raises `ConfigError` if no row could be answered."""
    with phase_line(context.console, "listing the input files", in_log=False):
        inputs = split_input(context.config, context.console, context.piped)
    with phase_line(context.console, "reading the first rows", in_log=False):
        look_at_rows(context, inputs.splits, check)
    return inputs


def _lock(context: RunContext) -> None:
    """Locks the output for this run, until the end of the run."""
    config, stack = context.config, context.stack
    context.span = stack.enter_context(run_span(config.run.traces, config.engine, context.console))
    context.ownership.begin()
    stack.enter_context(run_lock(context.fs, context.root))
    # The directory is examined again: another run may have ended between the first look and the lock.
    context.ownership = Ownership.look(config, context.fs, context.root, context.piped)
    context.ownership.settle()
    if not config.run.resume:
        registry.clear(context)
        clear_tables(context.fs, context.root)
        context.ownership.clear()
    context.state = stack.enter_context(keep_run_state(config, context.fs, context.root, context.origin.entries()))


def _commit(context: RunContext, inputs: SplitInput, passes: Passes) -> Outcome:
    """Writes the report, and then the manifest, which makes the output complete."""
    fs, root = context.fs, context.root
    if passes.unfinished is not None:
        context.state.ended = passes.unfinished
        return Outcome(STOPPED)
    if passes.current is not None:
        context.console.print("No request was sent: the output is up to date.", highlight=False)
        return Outcome(_exit_status(passes.current), {**passes.current, "this_run": this_run(context.state.now)})
    assert passes.written is not None
    written, more = passes.written, registry.manifest_entries(context)
    if (table := context.config.output.table) is not None:
        with context.phase("appending to the table"):
            more["table"] = append_rows(fs, root, table, dict(sorted(written.keys.items())))
    manifest = make_manifest(context, inputs.splits, passes.summaries, written, passes.index, more)
    if context.span is not None:
        context.span.rows(manifest["rows"])
    context.ownership.drop_stale(written.files)
    abort_uploads(context.output_path, context.ownership.may_upload)
    write_report(fs, root, manifest, written.stats, context.console)
    hasher = context.row_reader.hasher
    manifest["stamps"] = stamps_entry(fs, root, hasher, inputs.splits, written.files, passes.index.paths)
    write_atomic(fs, f"{root}/{MANIFEST}", orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    context.ownership.commit(written.files)
    return Outcome(_exit_status(manifest), manifest)


def _exit_status(manifest: dict[str, Any]) -> int:
    return WITH_FAILURES if manifest["rows"]["failed"] else OK
