"""Writes the final output from the ledger: every input row once, in input order, with one schema.

Each job reads its splits of the input again, so the input's own columns never go through the workers. It looks up the key
of every row in the ledger. A job that was killed is repeated. The caller writes the manifest last: it commits the output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
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
from pipeline.output.plan import embedding_type, part_names, plan_columns, plan_jobs
from pipeline.report.stats import Stats
from pipeline.storage.filesystem import exists, remove
from pipeline.storage.ledger_snapshot import LedgerSnapshot
from pipeline.storage.output_files import MANIFEST
from pipeline.tasks import TaskRunner


@dataclass(slots=True)
class WrittenOutput:
    """The results of all jobs together."""

    # For each request of the index: its place in `groups`; -1 if no input row has it.
    group: npt.NDArray[np.int8 | np.int32]
    groups: list[tuple[str, str]] = field(default_factory=list)  # the lane and the model of the answers
    rows: int = 0
    failed: int = 0
    truncated: int = 0  # answered rows whose finish reason is `length`
    missing: int = 0  # rows without a record in the ledger: another pass is needed
    errors: Counter[str] = field(default_factory=Counter)  # failed rows by type
    files: dict[str, int] = field(default_factory=dict)  # path below the output -> rows
    stats: Stats = field(default_factory=Stats)
    lengths: set[int] = field(default_factory=set)  # of the embeddings
    keys: dict[str, bytes] = field(default_factory=dict)  # see `JobResult`
    # `numbered`: for each request of the index, True if a row with a numbered key has it. `clashes`: positions of requests
    # that several of these rows have, because their numbers were not known.
    numbered: npt.NDArray[np.bool_] | None = None
    clashes: list[npt.NDArray[np.uint32]] = field(default_factory=list)

    def add(self, result: JobResult) -> None:
        self.rows += result.rows
        self.failed += result.failed
        self.truncated += result.truncated
        self.missing += result.missing
        self.errors.update(result.errors)
        self.files.update(result.files)
        self.keys.update(result.keys)
        self.lengths |= result.lengths
        for group, taken in result.used.items():
            if group not in self.groups:
                self.groups.append(group)
                if len(self.groups) > np.iinfo(np.int8).max:  # of a run whose rows name many models
                    self.group = self.group.astype(np.int32, copy=False)
            for positions in taken:
                self.group[positions] = self.groups.index(group)
        self.stats.merge(result.stats)
        for positions in result.numbered:
            self._find_clashes(positions)

    @property
    def used(self) -> npt.NDArray[np.bool_]:
        """For each request of the index: True if an input row has it."""
        return self.group >= 0

    def _find_clashes(self, positions: npt.NDArray[np.uint32]) -> None:
        if self.numbered is None:
            self.numbered = np.zeros(len(self.group), np.bool_)
        unique, counts = np.unique(positions, return_counts=True)
        clashes = unique[(counts > 1) | self.numbered[unique]]
        if len(clashes):
            self.clashes.append(clashes)
        self.numbered[unique] = True


def finalize(
    context: RunContext,
    inputs: SplitInput,
    summaries: Mapping[int, SplitSummary],
    snapshot: LedgerSnapshot,
    tasks: TaskRunner,
) -> WrittenOutput:
    """Writes data/ and errors/. Raises `Stopped` if foreign files are in the way or the storage fails."""
    output = context.config.output
    jobs = plan_jobs(inputs.splits, summaries, snapshot.index.answer_bytes)
    if foreign := context.ownership.intend(part_names(jobs, output.format)):
        text = f"{context.ownership.in_the_way(foreign)}; the same command continues"
        raise Stopped(text, code=ErrorCode.FILE_IN_THE_WAY)
    # No reader may trust the files until the manifest is written again.
    if exists(context.fs, f"{context.root}/{MANIFEST}"):
        remove(context.fs, f"{context.root}/{MANIFEST}")
    answer_columns = plan_answer_columns(output.columns, context.params.response_format)
    params = list(context.params.given())

    def write(lengths: Collection[int]) -> WrittenOutput:
        embedding = embedding_type(output.embedding, lengths)
        columns = plan_columns(inputs.splits, summaries, context.row_reader, answer_columns, params, embedding)
        writer = PartWriter(context.row_reader, columns, output)
        written = WrittenOutput(np.full(len(snapshot.index), -1, np.int8))
        for result in tasks.map(writer.run, jobs, snapshot):
            written.add(result)
        return written

    with context.phase("writing the output"):
        try:
            known = snapshot.index.lengths
            written = write(known)
            if len(known) > 1 and len(written.lengths) == 1 and not written.missing:
                # The other lengths are those of earlier runs: now the size of the list is known.
                written = write(written.lengths)
        except OSError as error:
            text = f"writing the output failed: {one_line(error)}; the same command continues"
            raise Stopped(text, code=ErrorCode.STORE_FAILED) from None
    return written
