"""Passes of a run: execute, put the output together, and again for rows that have no record yet."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engines.errors import ErrorCode
from pipeline.context import RunContext
from pipeline.dataset.plan import SplitInput
from pipeline.dataset.reader import SplitSummary
from pipeline.errors import Stopped
from pipeline.executors.base import Executor
from pipeline.monitor.status import RunStatus
from pipeline.output.finalize import WrittenOutput, finalize
from pipeline.output.manifest import unchanged
from pipeline.storage.ledger_index import Index
from pipeline.storage.ledger_snapshot import LedgerSnapshot
from pipeline.tasks import LocalTasks, TaskRunner

# A row lost by an engine crash or a 64-bit collision of keys is asked in another pass. More passes than this mean a bug.
MAX_PASSES = 5


@dataclass(slots=True)
class Passes:
    """The state of a run after its passes. One of `written`, `current` and `unfinished` is set in the end."""

    totals: RunStatus = field(default_factory=RunStatus)  # done, failed and crashes of this run
    summaries: dict[int, SplitSummary] = field(default_factory=dict)
    index: Index = field(default_factory=Index.empty)
    written: WrittenOutput | None = None
    current: dict[str, Any] | None = None  # the manifest of an output that is up to date
    unfinished: str | None = None  # why work goes on elsewhere

    def execute(self, executors: Sequence[Executor], inputs: SplitInput, known: LedgerSnapshot) -> None:
        """Runs the executors in turn. Each takes the rows that the ones before it left."""
        for number, executor in enumerate(executors):
            if number:
                known = executor.context.snapshot(failed_count_as_answered=True)
            execution = executor.execute(inputs, known)
            self.totals.done += execution.status.done
            self.totals.failed += execution.status.failed
            self.totals.crashes += execution.status.crashes
            self.summaries = execution.summaries
            self.unfinished = execution.unfinished
            if self.unfinished is not None:
                return


def run_passes(context: RunContext, executors: Sequence[Executor], inputs: SplitInput) -> Passes:
    """Passes until every row has a record and is written. Later passes need the last executor only."""
    passes, missing = Passes(), sys.maxsize
    known = context.snapshot(failed_count_as_answered=not context.config.run.retry_failed)
    for number in range(MAX_PASSES):
        passes.execute(executors[-1:] if number else executors, inputs, known)
        if passes.unfinished is not None:
            return passes
        # Replaces the snapshot before it, whose memory is free now.
        known = context.snapshot(failed_count_as_answered=True)
        passes.index = known.index
        if not passes.totals.done + passes.totals.failed:
            passes.current = unchanged(context.config, context.fs, context.root, inputs.splits, passes.index)
            if passes.current is not None:
                return passes
        context.state.enter("putting the output together")
        tasks: TaskRunner = LocalTasks() if inputs.small and known.small else context.cluster
        written = finalize(context, inputs, passes.summaries, known, tasks)
        if not written.missing:
            passes.written = written
            return passes
        if written.missing >= missing:
            text = f"{written.missing:,} rows have no answer though they were asked: do all nodes see {context.root}?"
            raise Stopped(text, code=ErrorCode.ROWS_MISSING)
        missing = written.missing
        context.console.print(f"{missing:,} rows have no answer yet; asking them.", highlight=False)
    text = f"rows are still missing after {MAX_PASSES} passes; the same command goes on from here"
    raise Stopped(text, code=ErrorCode.ROWS_MISSING)
