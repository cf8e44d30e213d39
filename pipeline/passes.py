"""The passes of a run. A pass sends the requests and writes the output. Rows without a record get another pass."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engines.errors import ErrorCode
from engines.text import counted, one_line
from pipeline.context import RunContext
from pipeline.dataset.plan import SplitInput
from pipeline.dataset.reader import SplitSummary
from pipeline.dataset.repeats import RepeatCounter, with_earlier
from pipeline.errors import Stopped
from pipeline.executors.base import Executor
from pipeline.output.finalize import WrittenOutput, finalize
from pipeline.output.up_to_date import finished, unchanged
from pipeline.storage.ledger_index import OLD, Index
from pipeline.storage.ledger_snapshot import LedgerSnapshot
from pipeline.tasks import LocalTasks, TaskRunner

# A row lost by an engine crash or a 64-bit collision of keys is asked in another pass. If a run needs more passes than
# this, there is a bug.
MAX_PASSES = 5


@dataclass(slots=True)
class Passes:
    """The state of a run after its passes. At the end, one of `written`, `current` and `unfinished` is set."""

    summaries: dict[int, SplitSummary] = field(default_factory=dict)
    index: Index = field(default_factory=Index.empty)
    written: WrittenOutput | None = None
    current: dict[str, Any] | None = None  # the manifest of an output that is up to date
    unfinished: str | None = None  # why the run ends before all rows have a result

    def execute(self, executors: Sequence[Executor], inputs: SplitInput, known: LedgerSnapshot) -> None:
        """Runs the executors in turn. Each one takes the rows that the earlier ones left."""
        for number, executor in enumerate(executors):
            if number:
                known = executor.context.snapshot(failed_count_as_answered=True)
            execution = executor.execute(inputs, known)
            self.summaries = execution.summaries
            self.unfinished = execution.unfinished
            if self.unfinished is not None:
                return


def run_passes(context: RunContext, executors: Sequence[Executor], inputs: SplitInput) -> Passes:
    """Runs passes until every row has a record and is written. Later passes use only the last executor. Reads no row if the
    output is up to date."""
    passes, missing = Passes(), sys.maxsize
    if not any(executor.under_way for executor in executors):
        hasher = context.row_reader.hasher
        passes.current = finished(context.config, context.fs, context.root, inputs.splits, hasher)
        if passes.current is not None:
            return passes
    executors[0].prepare()
    known = context.snapshot(failed_count_as_answered=not context.config.run.retry_failed)
    for number in range(MAX_PASSES):
        passes.execute(executors[-1:] if number else executors, inputs, known)
        if passes.unfinished is not None:
            return passes
        # Replaces the previous snapshot and so frees its memory.
        known = context.snapshot(failed_count_as_answered=True)
        passes.index = known.index
        if not context.state.now.asked:
            contents = sum(summary.contents for summary in passes.summaries.values())
            passes.current = unchanged(context.config, context.fs, context.root, inputs.splits, passes.index, contents)
            if passes.current is not None:
                return passes
        tasks: TaskRunner = LocalTasks() if inputs.small and known.small else context.cluster
        written = finalize(context, inputs, passes.summaries, known, tasks)
        if written.clashes:
            inputs = _numbered(context, inputs, written, known, tasks)
            context.console.print("Rows of several files have the same id: each of them gets a number.", highlight=False)
            continue
        if not written.missing:
            passes.written = written
            _report_unmatched(context, passes)
            return passes
        if written.missing >= missing:
            lost = counted(written.missing, "row was sent and has", "rows were sent and have")
            text = f"{lost} no result: do all nodes see the same {context.root}?"
            raise Stopped(text, code=ErrorCode.ROWS_MISSING)
        missing = written.missing
        context.console.print(
            f"{counted(missing, 'row has', 'rows have')} no result yet: the missing requests are sent now.", highlight=False
        )
    text = f"rows have no result after {MAX_PASSES} passes; the same command continues"
    raise Stopped(text, code=ErrorCode.ROWS_MISSING)


def _numbered(
    context: RunContext, inputs: SplitInput, written: WrittenOutput, known: LedgerSnapshot, tasks: TaskRunner
) -> SplitInput:
    """The input, with the numbers of rows that have equal keys in several splits. Raises `Stopped` if the storage fails."""
    repeated = np.unique(known.index.hi[np.concatenate(written.clashes)])
    counter = RepeatCounter(context.row_reader, repeated)
    try:
        return replace(inputs, splits=with_earlier(inputs.splits, tasks.map(counter.run, inputs.splits, known)))
    except OSError as error:
        text = f"reading the input failed: {one_line(error)}; the same command continues"
        raise Stopped(text, code=ErrorCode.STORE_FAILED) from None


def _report_unmatched(context: RunContext, passes: Passes) -> None:
    """Reports the answers of an earlier version that no row uses, if keys have changed since and rows were asked."""
    assert passes.written is not None
    changed = context.row_reader.hasher.differs or any(summary.contents for summary in passes.summaries.values())
    unmatched = int(np.count_nonzero(((passes.index.flags & OLD) > 0) & ~passes.written.used))
    if changed and unmatched and context.state.now.asked:
        match = "answer of an earlier version matches", "answers of an earlier version match"
        text = f"{counted(unmatched, *match)} no row any more"
        reason = "the request, a file in it or the server's address has changed"
        context.console.print(f"{text}: {reason}.", highlight=False)
