"""From the ledger to the final output: every input row once, in input order, in one schema.

Each job reads its piece of the input again (the input's own columns never travel through the workers) and looks every row's
key up in the ledger. A job that was killed is done again. The manifest, written last by the caller, commits the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engines.errors import ErrorCode
from engines.text import one_line
from pipeline.context import RunContext
from pipeline.dataset.plan import SplitInput
from pipeline.dataset.reader import SplitSummary
from pipeline.errors import Stopped
from pipeline.output.answer_columns import plan_answer_columns
from pipeline.output.part_writer import JobResult, PartWriter
from pipeline.output.plan import part_names, plan_columns, plan_jobs
from pipeline.report.stats import Stats
from pipeline.storage.filesystem import exists, remove
from pipeline.storage.ledger_snapshot import LedgerSnapshot
from pipeline.storage.output_files import MANIFEST
from pipeline.tasks import TaskRunner


@dataclass(slots=True)
class WrittenOutput:
    """The results of all jobs together."""

    used: npt.NDArray[np.bool_]  # for each request of the index: an input row has it
    rows: int = 0
    failed: int = 0
    missing: int = 0  # rows that the ledger has no record of: the run is not over
    errors: Counter[str] = field(default_factory=Counter)  # failed rows by type
    files: dict[str, int] = field(default_factory=dict)  # path below the output -> rows
    stats: Stats = field(default_factory=Stats)

    def add(self, result: JobResult) -> None:
        self.rows += result.rows
        self.failed += result.failed
        self.missing += result.missing
        self.errors.update(result.errors)
        self.files.update(result.files)
        for positions in result.used:
            self.used[positions] = True
        self.stats.merge(result.stats)


def finalize(
    context: RunContext,
    inputs: SplitInput,
    summaries: Mapping[int, SplitSummary],
    snapshot: LedgerSnapshot,
    tasks: TaskRunner,
) -> WrittenOutput:
    """Writes data/ and errors/. Raises `Stopped` if foreign files are in the way or the storage fails."""
    output = context.config.output
    jobs = plan_jobs(inputs.splits, summaries)
    if foreign := context.ownership.intend(part_names(jobs, output.format)):
        text = f"{context.ownership.in_the_way(foreign)}; the same command goes on from here"
        raise Stopped(text, code=ErrorCode.FILE_IN_THE_WAY)
    # No reader may trust the files until the manifest is written again.
    if exists(context.fs, f"{context.root}/{MANIFEST}"):
        remove(context.fs, f"{context.root}/{MANIFEST}")
    answer_columns = plan_answer_columns(output.columns, context.params.response_format)
    params = list(context.params.given())
    columns = plan_columns(inputs.splits, summaries, context.row_reader, answer_columns, params)
    writer = PartWriter(context.row_reader, columns, output)
    written = WrittenOutput(np.zeros(len(snapshot.index), np.bool_))
    with context.console.status("putting the output together"):
        try:
            for result in tasks.map(writer.run, jobs, snapshot):
                written.add(result)
        except OSError as error:
            text = f"putting the output together failed: {one_line(error)}; the same command goes on"
            raise Stopped(text, code=ErrorCode.STORE_FAILED) from None
    return written
