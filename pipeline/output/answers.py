"""Reads the answers to rows from the ledger. `answer_columns.py` makes the columns of `output.columns` from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from engines.types import Completion
from pipeline.output.input_rows import InputRows
from pipeline.storage.ledger import ANSWER_SCHEMA, completion_columns, read_rows
from pipeline.storage.ledger_index import KeyLookup


@dataclass(slots=True)
class FoundAnswers:
    """The results of the rows of one part file, in the rows' order."""

    positions: npt.NDArray[np.int64]  # in the index; -1: the row could not be read
    completions: pa.Table
    done_at: pa.ChunkedArray

    @property
    def failed(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.completions["error"].is_valid())


def find_answers(rows: InputRows, lookup: KeyLookup, fs: pafs.FileSystem) -> FoundAnswers | int:
    """The results of all rows or, if the ledger does not have all, the number of missing ones."""
    positions = np.full(len(rows), -1, np.int64)
    keyed = np.array([key is not None for key in rows.keys], np.bool_)
    positions[keyed], segment, row = lookup.locate([key for key in rows.keys if key is not None])
    if missing := int((keyed & (positions < 0)).sum()):
        return missing
    table = _read(rows, positions, lookup.paths, segment, row, fs)
    return FoundAnswers(positions, table.drop_columns("done_at"), table["done_at"])


def _read(
    rows: InputRows,
    positions: npt.NDArray[np.int64],
    paths: list[str],
    segment: npt.NDArray[np.int32],
    row: npt.NDArray[np.int32],
    fs: pafs.FileSystem,
) -> pa.Table:
    """The results in the rows' order. Every segment is opened once. A row that could not be read gets its failure."""
    tables: list[pa.Table] = []
    order: list[npt.NDArray[np.int64]] = []
    answered = np.flatnonzero(positions >= 0)
    for number in np.unique(segment):
        mine = segment == number
        tables.append(read_rows(fs, paths[number], row[mine]))
        order.append(answered[mine])
    unread = np.flatnonzero(positions < 0)
    if len(unread) or not tables:
        failures = [Completion(error=rows.failures[row], attempts=0) for row in unread]
        never = pa.nulls(len(failures), ANSWER_SCHEMA.field("done_at").type)
        tables.append(pa.Table.from_arrays([*completion_columns(failures), never], schema=ANSWER_SCHEMA))
        order.append(unread)
    back = np.argsort(np.concatenate(order), kind="stable")
    return pa.concat_tables(tables).take(pa.array(back))
