"""The parts of input files that tasks read, and the rows in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.storage.filesystem import FileStamp

BATCH_ROWS = 2000
# A batch ends early at this many bytes of input, to bound the memory that long rows take.
BATCH_BYTES = 16 << 20
# Up to this many bytes of a row that cannot be parsed are kept for the error row.
RAW_BYTES = 64 << 10

# Columns that the directories of a file give: (name, value).
Partition = tuple[tuple[str, pa.Scalar], ...]


@dataclass(frozen=True, slots=True)
class FileSplit:
    """A unit of reading: a whole file, lines of a plain JSONL file, or row groups of a Parquet file."""

    file: str  # a path or URI for `resolve`
    name: str  # relative to the dataset's root; part of a row's place, and unchanged when the dataset moves
    kind: str  # "jsonl", "json", "csv", "parquet", "arrow", "lance", or "bad": a file that cannot be read
    start: int  # byte offset or row group, inclusive
    stop: int  # byte offset or row group, exclusive; -1: the end of a stream
    first_row: int  # number in the file, from 0: of the line (blank lines count) or of the row; see docs/input.md
    reason: str = ""  # for a bad file: a description that completes "the file is …"
    partition: Partition = ()
    take: Sequence[int] | None = None  # the numbers in this split, ascending, of the rows to read; None: all rows
    stamp: FileStamp = field(default=FileStamp(), compare=False)  # of the file, before it was opened
    old_name: str = ""  # the name in earlier versions, if it differs: their ledgers have keys with it

    @property
    def typed(self) -> bool:
        """True if the columns have Arrow types."""
        return self.kind in ("parquet", "arrow", "lance")


@dataclass(slots=True)
class RawRow:
    """One row: its columns, or the reason why it cannot be read."""

    row: int  # number in the file, from 0; messages count from 1
    columns: dict[str, Any] | None
    error: str | None = None
    raw: bytes | None = None  # with an error: the beginning of the row
    size: int = field(default=0, compare=False)  # bytes of the row in its file; 0: not known, as in a columnar file
