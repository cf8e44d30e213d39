"""Reads the input again for the output: each row with its key, and the input's own columns as Arrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from engines.errors import Failure
from pipeline.dataset.column_types import to_array
from pipeline.dataset.reader import ParsedRow, ReadSplit, RowReader
from pipeline.dataset.source import read_table
from pipeline.output.plan import OutputColumns
from pipeline.storage.exact_json import dumps


@dataclass(slots=True)
class InputRows:
    """The input rows of one part file; lists of one length."""

    ids: list[str] = field(default_factory=list)
    keys: list[bytes | None] = field(default_factory=list)  # None: the row could not be read
    messages: list[bytes | None] = field(default_factory=list)
    failures: list[Failure | None] = field(default_factory=list)  # why a row could not be read
    raw: list[bytes | None] = field(default_factory=list)
    values: list[Mapping[str, Any]] = field(default_factory=list)  # the columns as Python values
    own: list[pa.Table] = field(default_factory=list)  # the columns as Arrow; one after the other they are all rows

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, items: Sequence[ParsedRow], own: pa.Table) -> None:
        self.own.append(own)
        for item in items:
            self.ids.append(item.id)
            self.keys.append(item.key)
            self.messages.append(dumps(item.parsed.messages) if item.parsed else None)
            self.failures.append(item.failure)
            self.raw.append(item.row.raw)
            self.values.append(item.row.columns or {})


class InputReader:
    """Reads splits with the columns of the output plan."""

    def __init__(self, row_reader: RowReader, columns: OutputColumns) -> None:
        self.row_reader, self.columns, self.schema = row_reader, columns.own, columns.own_schema

    def read(self, splits: Sequence[ReadSplit]) -> Iterator[tuple[list[ParsedRow], pa.Table]]:
        """Yields rows with their columns: taken as they are from Parquet, otherwise built from the values."""
        for split in splits:
            batches = read_table(split.file_split) if split.file_split.kind == "parquet" else iter(())
            for items in self.row_reader.read(split):
                batch = next(batches, None)
                if batch is not None and batch.num_rows >= len(items):
                    yield items, self._conform(batch.slice(0, len(items)))
                else:
                    yield items, self._build([item.row.columns or {} for item in items])

    def parts(self, splits: Sequence[ReadSplit], rows: int, size: int) -> Iterator[InputRows]:
        """Yields all `rows` of the splits in groups of `size`. Raises `OSError` if the splits have more or fewer rows:
        a broken read must not make a shorter or shifted output."""
        part, read = InputRows(), 0
        for items, own in self.read(splits):
            read += len(items)
            if read > rows:
                break
            while items:
                room = size - len(part)
                part.add(items[:room], own.slice(0, room))
                items, own = items[room:], own.slice(room)
                if len(part) == size:
                    yield part
                    part = InputRows()
        if read != rows:
            name = splits[0].file_split.name
            raise OSError(f"{name} and on: {read} rows where there were {rows}; did the input change?")
        if len(part) or not rows:
            yield part

    def _conform(self, batch: pa.RecordBatch) -> pa.Table:
        columns = []
        for column in self.columns:
            if column.source not in batch.schema.names:
                columns.append(pa.nulls(batch.num_rows, column.type or pa.string()))
            elif column.type is None:
                columns.append(to_array(batch[column.source].to_pylist(), None))
            else:
                columns.append(batch[column.source].cast(column.type))
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _build(self, values: Sequence[Mapping[str, Any]]) -> pa.Table:
        columns = [to_array([row.get(c.source) for row in values], c.type) for c in self.columns]
        return pa.Table.from_arrays(columns, schema=self.schema)
