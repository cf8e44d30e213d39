"""Reads rows and converts each to a key and a conversation, or to an error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from engines.errors import EngineError, Failure, invalid
from engines.registry import kind_of
from pipeline.dataset.column_types import ColumnKinds
from pipeline.dataset.formats import Parsed, RowParser
from pipeline.dataset.keys import RequestHasher
from pipeline.dataset.source import FileSplit, RawRow, read_file_split


@dataclass(frozen=True, slots=True)
class ReadSplit:
    """The rows of one read task: a file split, or its first `limit` rows."""

    number: int
    file_split: FileSplit
    limit: int | None = None


@dataclass(slots=True)
class ParsedRow:
    """One parsed input row. It has either a key and a conversation, or a failure that says why it cannot be asked."""

    row: RawRow
    id: str
    key: bytes | None = None
    parsed: Parsed | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class RowReader:
    """Reads rows. The executors and finalize use the same reader, so both see the same rows. Small: every task gets one."""

    parser: RowParser
    hasher: RequestHasher
    max_row_bytes: int

    def read(self, split: ReadSplit) -> Iterator[list[ParsedRow]]:
        """The rows of a split, in order and in batches."""
        left = split.limit
        for rows in read_file_split(split.file_split, max_row_bytes=self.max_row_bytes):
            if left is not None:
                rows = rows[:left]
                left -= len(rows)
            if rows:
                yield [self._parsed_row(split.file_split, row) for row in rows]
            if left == 0:
                return

    def _parsed_row(self, file_split: FileSplit, row: RawRow) -> ParsedRow:
        place = f"{file_split.name}:{row.row + 1}"
        if row.columns is None:
            return ParsedRow(row, place, failure=_invalid_row(place, row.error or "unreadable"))
        try:
            parsed = self.parser.parse(row.columns)
            if parsed.model and "body" in row.columns and kind_of(self.hasher.engine).holds_model:
                # Every line of an OpenAI batch file names a model. An engine with one loaded model ignores the name.
                parsed.model = None
            key = self.hasher.key(parsed, place)
        except EngineError as error:
            return ParsedRow(row, place, failure=_invalid_row(place, str(error)))
        return ParsedRow(row, parsed.id if parsed.id is not None else place, key, parsed)


def _invalid_row(place: str, reason: str) -> Failure:
    return Failure.of(invalid(f"{place}: {reason}"))


@dataclass(slots=True)
class SplitSummary:
    """Counts of one split that was read."""

    rows: int = 0
    invalid: int = 0
    answered: int = 0  # rows that were skipped, because the ledger has their answers
    kinds: ColumnKinds = field(default_factory=ColumnKinds)  # of JSON columns; Parquet files have types
    params: set[str] = field(default_factory=set)  # generation parameters that rows set for themselves
