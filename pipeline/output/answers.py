"""Reads the answers to rows from the ledger. `answer_columns.py` makes the columns of `output.columns` from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from engines.errors import ErrorCode
from engines.text import one_line
from engines.types import Completion
from pipeline.dataset.reader import keep_old_keys
from pipeline.errors import Stopped
from pipeline.output.input_rows import PIECE_BYTES, InputRows
from pipeline.output.spending import BATCH, LIVE
from pipeline.storage.ledger import (
    ANSWER_SCHEMA,
    COMPLETION_COLUMNS,
    completion_columns,
    is_batch_segment,
    is_damaged,
    read_rows,
)
from pipeline.storage.ledger_index import KeyLookup


@dataclass(slots=True)
class FoundAnswers:
    """The results of consecutive rows, in the rows' order."""

    positions: npt.NDArray[np.int64]  # in the index; -1: the row could not be read
    completions: pa.Table
    done_at: pa.ChunkedArray
    batched: npt.NDArray[np.bool_]  # True: the answer came from a provider's batch

    @property
    def failed(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.completions["error"].is_valid())

    def by_lane_and_model(self) -> Iterator[tuple[tuple[str, str], npt.NDArray[np.uint32]]]:
        """(lane, model) -> the positions of the requests whose result came from there."""
        models = self.completions["model"].combine_chunks().fill_null("").dictionary_encode()
        asked, codes = self.positions >= 0, np.asarray(models.indices)
        for lane, taken in ((LIVE, asked & ~self.batched), (BATCH, asked & self.batched)):
            for code in np.unique(codes[taken]).tolist():
                yield (lane, models.dictionary[code].as_py()), self.positions[taken & (codes == code)].astype(np.uint32)

    @property
    def truncated(self) -> int:
        """The number of answered rows whose answer was cut at the maximum length."""
        cut = np.asarray(pc.fill_null(pc.equal(self.completions["finish_reason"], "length"), False))
        return int(np.count_nonzero(cut & ~self.failed))


@dataclass(slots=True)
class AnswerPlaces:
    """The places of the records of rows in the ledger; arrays with one element for each row."""

    positions: npt.NDArray[np.int64]  # in the index; -1: there is no record
    segment: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    missing: int  # rows that have a key and no record

    @classmethod
    def find(cls, rows: InputRows, lookup: KeyLookup) -> AnswerPlaces:
        """Finds the records by the rows' keys. For a row without such a record, tries the keys of earlier versions."""
        keep_old_keys(rows.items, lookup)
        positions, segment, row = (np.full(len(rows), -1, np.int64) for _ in range(3))
        found = cls(positions, segment, row, missing=0)
        for keys in (rows.keys, rows.old_keys):
            at = np.flatnonzero(np.array([key is not None for key in keys], np.bool_) & (found.positions < 0))
            if not len(at):
                continue
            located, segments, rows_there = lookup.locate([keys[n] or b"" for n in at])
            there = at[located >= 0]
            found.positions[at], found.segment[there], found.row[there] = located, segments, rows_there
        found.missing = sum(item.key is not None for item in rows.items) - int((found.positions >= 0).sum())
        return found

    def slices(self, row_bytes: npt.NDArray[np.int64]) -> Iterator[slice]:
        """Divides the rows into consecutive slices. The records of a slice take about `PIECE_BYTES` or less: a record
        counts with the mean size of its segment."""
        sizes = np.where(self.segment >= 0, row_bytes[self.segment], 0) if len(row_bytes) else np.zeros(len(self.segment))
        start, ends = 0, np.cumsum(sizes)
        while start < len(ends) or not start:
            before = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + PIECE_BYTES, side="right")))
            yield slice(start, min(stop, len(ends)))
            start = stop

    def read(
        self, rows: InputRows, taken: slice, paths: list[str], fs: pafs.FileSystem, schema: pa.Schema = ANSWER_SCHEMA
    ) -> FoundAnswers:
        """The results of `rows`, which is the slice `taken` of all rows. A row that could not be read gets its failure.
        Each segment is opened once. Raises `Stopped` for a damaged segment."""
        positions, segment, row = self.positions[taken], self.segment[taken], self.row[taken]
        tables: list[pa.Table] = []
        order: list[npt.NDArray[np.int64]] = []
        for number in np.unique(segment[segment >= 0]):
            mine = np.flatnonzero(segment == number)
            tables.append(_read_rows(fs, paths[number], row[mine].astype(np.int32), schema))
            order.append(mine)
        unread = np.flatnonzero(positions < 0)
        if len(unread) or not tables:
            failures = [Completion(error=rows.items[at].failure, attempts=0) for at in unread]
            known = dict(zip(COMPLETION_COLUMNS, completion_columns(failures), strict=True))
            columns = [known[part.name] if part.name in known else pa.nulls(len(failures), part.type) for part in schema]
            tables.append(pa.Table.from_arrays(columns, schema=schema))
            order.append(unread)
        back = np.argsort(np.concatenate(order), kind="stable")
        table = pa.concat_tables(tables).take(pa.array(back))
        batched = np.array([is_batch_segment(path) for path in paths], np.bool_)
        batched = batched[segment] & (segment >= 0) if len(batched) else np.zeros(len(segment), np.bool_)
        return FoundAnswers(positions, table.drop_columns("done_at"), table["done_at"], batched)


def _read_rows(fs: pafs.FileSystem, path: str, rows: npt.NDArray[np.int32], schema: pa.Schema) -> pa.Table:
    try:
        return read_rows(fs, path, rows, schema)
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
        if not is_damaged(fs, path, error):
            raise
        text = f"the segment {path} is damaged ({one_line(error)}): move it away, and the run asks its rows again"
        raise Stopped(text, code=ErrorCode.STORE_FAILED) from None
