"""Reads the raw rows of a file split, in batches. A row that cannot be read is a row with an error.

`reader.py` parses these rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import TypeVar

import pyarrow as pa

from pipeline.dataset.arrow_rows import batches, rows_of
from pipeline.dataset.csv_rows import csv_rows
from pipeline.dataset.file_split import BATCH_BYTES, BATCH_ROWS, FileSplit, RawRow
from pipeline.dataset.json_rows import json_lines, json_values
from pipeline.storage.retry import steadily

T = TypeVar("T")
_TEXT_KINDS = {"jsonl": json_lines, "json": json_values, "csv": csv_rows}


def read_file_split(
    file_split: FileSplit, *, max_row_bytes: int = 32 << 20, batch_rows: int = BATCH_ROWS
) -> Iterator[list[RawRow]]:
    """The rows of a file split, in order and in batches. Memory is bounded by one batch and one row of `max_row_bytes`.

    Unreadable content becomes a row with an error; only a store that stays unavailable raises (`store_failed`). The batches
    of a file split with types match those of `read_table` row for row.
    """
    if file_split.kind == "bad":
        rows = iter([[RawRow(file_split.first_row, None, f"the file is {file_split.reason}")]])
    elif file_split.typed:
        rows = steadily(lambda: _typed_rows(file_split, batch_rows))
    else:
        rows = steadily(lambda: _text_rows(file_split, max_row_bytes, batch_rows))
    for chosen, batch in _chosen(file_split, rows, len):
        yield batch if chosen is None else [batch[at] for at in chosen]


def read_table(file_split: FileSplit, batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """The batches of a file split with types as Arrow record batches, one for each batch of `read_file_split`.

    Unreadable rows are one row of nulls here, and one row with an error in `read_file_split`.
    """
    tables = steadily(lambda: (batch.batch for batch in batches(file_split, batch_rows)))
    for chosen, batch in _chosen(file_split, tables, lambda batch: batch.num_rows):
        yield batch if chosen is None else batch.take(pa.array(chosen, pa.int64()))


def _typed_rows(file_split: FileSplit, batch_rows: int) -> Iterator[list[RawRow]]:
    for row, batch, error in batches(file_split, batch_rows):
        yield [RawRow(row, None, error)] if error else rows_of(row, batch)


def _text_rows(file_split: FileSplit, max_row_bytes: int, batch_rows: int) -> Iterator[list[RawRow]]:
    batch: list[RawRow] = []
    size = 0
    partition = [(name, value.as_py()) for name, value in file_split.partition]
    for row in _TEXT_KINDS[file_split.kind](file_split, max_row_bytes):
        if row.columns is not None:
            for name, value in partition:
                row.columns.setdefault(name, value)
        batch.append(row)
        size += row.size
        if len(batch) == batch_rows or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _chosen(file_split: FileSplit, batches: Iterator[T], size: Callable[[T], int]) -> Iterator[tuple[list[int] | None, T]]:
    """The batches with rows that `file_split.take` names, and the positions of these rows. None: all rows of the batch."""
    take = file_split.take
    if take is None:
        yield from ((None, batch) for batch in batches)
        return
    at = first = 0
    while at < len(take) and (batch := next(batches, None)) is not None:
        end = bisect_left(take, first + size(batch), at)
        if end > at:
            yield [row - first for row in take[at:end]], batch
        at, first = end, first + size(batch)
