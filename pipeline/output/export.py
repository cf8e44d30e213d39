"""The finished rows of a run that is not complete, in input order: answers of the ledger with the columns of the input.

Only reads. The run may be in progress: its merges of segments are noticed, and rows that it finishes meanwhile may be among
the exported ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from rich.console import Console

from pipeline.config import Config
from pipeline.dataset.formats import RowParser
from pipeline.dataset.keys import RequestHasher
from pipeline.dataset.occurrences import Occurrences
from pipeline.dataset.plan import list_splits
from pipeline.dataset.reader import ReadSplit, RowReader, SplitSummary
from pipeline.dataset.stdin import PipedInput
from pipeline.errors import Stopped
from pipeline.output.answer_columns import plan_answer_columns
from pipeline.output.answers import AnswerPlaces
from pipeline.output.input_rows import InputReader, InputRows
from pipeline.output.json_lines import data_lines
from pipeline.output.jsonl_styles import eagleray
from pipeline.output.plan import OutputColumns, embedding_type, plan_columns, plan_jobs
from pipeline.output.tables import data_table
from pipeline.storage.ledger_index import read_index
from pipeline.storage.output_files import DATA
from pipeline.storage.retry import TRIES, steadily

# Rows of data/ are read in batches of this size.
BATCH_ROWS = 1024


@dataclass(slots=True)
class ExportedRows:
    """Some finished rows, with the columns of data/."""

    table: pa.Table
    values: Sequence[Mapping[str, Any]]  # the rows' columns as they are in the input
    columns: OutputColumns

    def lines(self) -> bytes:
        """The rows as JSON lines."""
        return data_lines(self.table, self.values, self.columns, eagleray)


@dataclass(slots=True)
class RowCount:
    """Counts of input rows."""

    total: int = 0
    done: int = 0
    failed: int = 0

    @property
    def open(self) -> int:
        return self.total - self.done - self.failed


@dataclass
class LedgerExport:
    """Reads the input twice: first its columns, then its rows. Raises `ConfigError` if it cannot be read."""

    config: Config
    fs: pafs.FileSystem
    root: str  # of the output
    console: Console
    piped: PipedInput | None = None  # the copy of standard input, if that is the dataset
    with_failed: bool = True
    count: RowCount = field(default_factory=RowCount)

    def __post_init__(self) -> None:
        dataset, params = self.config.dataset, self.config.params()
        hasher = RequestHasher(self.config.engine, params)
        self.row_reader = RowReader(RowParser.of(self.config), hasher, dataset.max_row_bytes)
        self.splits = list_splits(self.config, self.console, self.piped)
        self.summaries = _summaries(self.splits, self.row_reader)
        answer_columns = plan_answer_columns(self.config.output.columns, params.response_format)
        given = list(params.given())
        self.index = read_index(self.fs, self.root)
        embedding = embedding_type(self.config.output.embedding, self.index.lengths)
        self.columns = plan_columns(self.splits, self.summaries, self.row_reader, answer_columns, given, embedding)
        self.count.total = sum(summary.rows for summary in self.summaries.values())

    @property
    def schema(self) -> pa.Schema:
        return self.columns.data_schema

    def rows(self) -> Iterator[ExportedRows]:
        """All finished rows, in pieces of bounded size. Counts them in `count`."""
        reader = InputReader(self.row_reader, self.columns)
        for job in plan_jobs(self.splits, self.summaries, self.index.answer_bytes):
            first = job.index
            for _, piece in reader.parts(job.splits, job.part_rows, self.index.old_until_ms):
                yield from self._finished(piece, first)
                first += len(piece)

    def _finished(self, piece: InputRows, first: int) -> Iterator[ExportedRows]:
        """The finished rows among `piece`. `first`: the place of its first row in the whole input. Raises `OSError`."""
        done = 0
        for number in range(TRIES):
            try:
                for exported in self._read(piece, first):
                    yield self._counted(exported)
                    done = exported.table["index"][-1].as_py() + 1 - first
                return
            except Stopped as damaged:
                raise OSError(str(damaged)) from None
            except FileNotFoundError:  # the run merged this segment: the new one has its records
                if number == TRIES - 1:
                    raise
                self.index = read_index(self.fs, self.root)
                piece, first, done = piece.slice(done, len(piece)), first + done, 0

    def _read(self, piece: InputRows, first: int) -> Iterator[ExportedRows]:
        places = AnswerPlaces.find(piece, self.index)
        unread = np.array([key is None for key in piece.keys], np.bool_)
        kept = np.flatnonzero((places.positions >= 0) | unread)
        if not len(kept):
            return
        piece = piece.take(kept)
        places = AnswerPlaces(places.positions[kept], places.segment[kept], places.row[kept], missing=0)
        for taken in places.slices(self.index.row_bytes):
            rows = piece.slice(taken.start, taken.stop)
            answers = places.read(rows, taken, self.index.paths, self.fs, self.columns.answer_schema)
            table = data_table(rows, pa.concat_tables(rows.own), answers, 0, self.columns)
            at = table.column_names.index("index")
            table = table.set_column(at, table.schema.field(at), pa.array(kept[taken] + first))
            yield ExportedRows(table, rows.values, self.columns)

    def _counted(self, exported: ExportedRows) -> ExportedRows:
        failed = np.asarray(exported.table["error"].is_valid())
        self.count.failed += int(failed.sum())
        self.count.done += int((~failed).sum())
        if self.with_failed or not failed.any():
            return exported
        at = np.flatnonzero(~failed)
        return ExportedRows(exported.table.take(pa.array(at)), [exported.values[n] for n in at], self.columns)


# For rows that come from data/: the input's own columns are in the table.
_STORED = OutputColumns([], [], (), raw=False, references=False)


@dataclass
class PartsExport:
    """The rows of a complete output, from the Parquet files in data/."""

    fs: pafs.FileSystem
    root: str  # of the output
    manifest: Mapping[str, Any]
    with_failed: bool = True
    count: RowCount = field(default_factory=RowCount)

    def __post_init__(self) -> None:
        self.paths = [f"{self.root}/{name}" for name in sorted(self.manifest["files"]) if name.startswith(f"{DATA}/")]
        with self.fs.open_input_file(self.paths[0]) as file:
            self.schema: pa.Schema = pq.read_schema(file)

    def rows(self) -> Iterator[ExportedRows]:
        """All rows, in pieces of bounded size. Counts them in `count`."""
        for path in self.paths:
            for table in steadily(partial(self._tables, path)):
                failed = np.asarray(table["error"].is_valid())
                self.count.total += len(table)
                self.count.failed += int(failed.sum())
                self.count.done += int((~failed).sum())
                kept = table if self.with_failed else table.filter(pa.array(~failed))
                if len(kept):
                    yield ExportedRows(kept, [{}] * len(kept), _STORED)

    def _tables(self, path: str) -> Iterator[pa.Table]:
        with self.fs.open_input_file(path) as file:
            for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(BATCH_ROWS):
                yield pa.Table.from_batches([batch])


def _summaries(splits: Sequence[ReadSplit], row_reader: RowReader) -> dict[int, SplitSummary]:
    """Reads all rows once. Rows with equal keys are numbered over the whole input."""
    found, occurrences = {}, Occurrences()
    for split in splits:
        found[split.number] = summary = SplitSummary()
        for items in row_reader.read(split, occurrences):
            summary.add(items, split)
        summary.earlier = occurrences.earlier()
    return found
