"""Reads the input again for the output: each row with its key, and the input's own columns as Arrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from engines.tasks import CHAT
from pipeline.dataset.arrow_rows import readable_values
from pipeline.dataset.column_types import to_array
from pipeline.dataset.formats import ArrowRow
from pipeline.dataset.read import read_table
from pipeline.dataset.reader import ParsedRow, ReadSplit, RowReader, size_of
from pipeline.output.plan import InputColumn, OutputColumns
from pipeline.storage.exact_json import dumps

# Rows of a part are read in pieces of up to this many bytes, so that large rows do not add up in memory.
PIECE_BYTES = 16 << 20


@dataclass(slots=True)
class InputRows:
    """Consecutive input rows of one part."""

    items: list[ParsedRow] = field(default_factory=list)
    old_keys: list[bytes | None] = field(default_factory=list)  # the keys of earlier versions, if they differ
    # The columns as Arrow tables, which together have all rows. Those that are not in data/ (`InputColumn.name`) are null
    # where the file has no types: `columns_of` has them.
    own: list[pa.Table] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def keys(self) -> list[bytes | None]:
        """None: the row could not be read."""
        return [item.key for item in self.items]

    @property
    def tasks(self) -> list[str]:
        return [item.parsed.task if item.parsed else CHAT for item in self.items]

    @property
    def values(self) -> list[Mapping[str, Any]]:
        """The columns as Python values."""
        return [item.row.columns or {} for item in self.items]

    def messages(self, at: int) -> bytes | None:
        """The conversation of a row as JSON. None if it has none, or could not be read."""
        parsed = self.items[at].parsed
        return dumps(parsed.messages) if parsed and parsed.messages else None

    def add(self, items: Sequence[ParsedRow], own: pa.Table, old_keys: Sequence[bytes | None]) -> None:
        self.items += items
        self.own.append(own)
        self.old_keys += old_keys

    def slice(self, start: int, stop: int) -> InputRows:
        """Some of the rows."""
        if (start, stop) == (0, len(self)):
            return self
        own = pa.concat_tables(self.own).slice(start, stop - start)
        return InputRows(self.items[start:stop], self.old_keys[start:stop], [own])

    def take(self, rows: npt.NDArray[np.int64]) -> InputRows:
        """The rows at these positions."""
        own = pa.concat_tables(self.own).take(pa.array(rows))
        return InputRows([self.items[at] for at in rows], [self.old_keys[at] for at in rows], [own])

    def columns_of(self, rows: npt.NDArray[np.int64], own: pa.Table, columns: Sequence[InputColumn]) -> pa.Table:
        """All columns of the rows at these positions. `own`: the columns of all rows."""
        found = own.take(pa.array(rows))
        values = [self.items[at].row.columns or {} for at in rows]
        without_types = [{} if type(row) is ArrowRow else row for row in values]
        if any(without_types):
            for at, column in enumerate(columns):
                if column.name is None:
                    more = to_array([row.get(column.source) for row in without_types], column.type)
                    found = found.set_column(at, found.schema.field(at), pc.coalesce(found[at], more))
        return found


class InputReader:
    """Reads splits with the columns of the output plan."""

    def __init__(self, row_reader: RowReader, columns: OutputColumns) -> None:
        self.row_reader, self.columns, self.schema = row_reader, columns.own, columns.own_schema

    def read(self, splits: Sequence[ReadSplit]) -> Iterator[tuple[list[ParsedRow], pa.Table]]:
        """Yields rows with their columns. A file with types gives the columns; otherwise they are built from the values."""
        for split in splits:
            batches = read_table(split.file_split) if split.file_split.typed else iter(())
            for items in self.row_reader.read(split):
                batch = next(batches, None)
                if batch is not None and batch.num_rows >= len(items):
                    yield items, self._conform(batch.slice(0, len(items)))
                else:
                    yield items, self._build([item.row.columns or {} for item in items])

    def parts(
        self, splits: Sequence[ReadSplit], part_rows: Sequence[int], old_until_ms: int
    ) -> Iterator[tuple[int, InputRows]]:
        """Yields (part, rows) for all rows of the splits: parts of `part_rows` rows, each in one or more pieces.

        Raises `OSError` if the splits have more or fewer rows: a broken read must not make a shorter or shifted output.
        """
        ends = _ends(part_rows)
        piece, size, part, read, expected = InputRows(), 0, 0, 0, sum(part_rows)
        for items, own in self.read(splits):
            if read + len(items) > expected:
                read += len(items)
                break
            sizes = [item.row.size or size_of(item.row.columns or {}) for item in items]
            while items:
                room = _rows_that_fit(sizes, PIECE_BYTES - size, ends[part] - read)
                old = [self.row_reader.old_key(i, old_until_ms) if old_until_ms else None for i in items[:room]]
                piece.add(items[:room], own.slice(0, room), old)
                read, size = read + room, size + sum(sizes[:room])
                items, own, sizes = items[room:], own.slice(room), sizes[room:]
                if read == ends[part] or size >= PIECE_BYTES:
                    yield part, piece
                    piece, size = InputRows(), 0
                part += read == ends[part]
        if read != expected:
            name = splits[0].file_split.name
            raise OSError(f"the input from {name} on has {read} rows instead of {expected}; did it change?")
        if len(piece) or not expected:
            yield part, piece

    def _conform(self, batch: pa.RecordBatch) -> pa.Table:
        columns = []
        for column in self.columns:
            if column.source not in batch.schema.names:
                columns.append(pa.nulls(batch.num_rows, column.type or pa.string()))
            elif column.type is None:
                columns.append(to_array(readable_values(batch[column.source]), None))
            else:
                columns.append(batch[column.source].cast(column.type))
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _build(self, values: Sequence[Mapping[str, Any]]) -> pa.Table:
        columns = [
            pa.nulls(len(values), c.type or pa.string())
            if c.name is None
            else to_array([row.get(c.source) for row in values], c.type)
            for c in self.columns
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)


def _ends(part_rows: Sequence[int]) -> list[int]:
    ends = [0]
    for rows in part_rows:
        ends.append(ends[-1] + rows)
    return ends[1:]


def _rows_that_fit(sizes: Sequence[int], left_bytes: int, left_rows: int) -> int:
    """The number of rows until `left_bytes` are reached, at least 1 and at most `left_rows`."""
    if len(sizes) <= left_rows and sum(sizes) <= left_bytes:
        return len(sizes)
    rows = 0
    while rows < min(len(sizes), left_rows) and (not rows or left_bytes > 0):
        left_bytes -= sizes[rows]
        rows += 1
    return rows
