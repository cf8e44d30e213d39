"""The ledger records which requests are answered. It consists of segments only.

A segment is a small immutable Parquet file under `_segments/`. A worker writes its finished requests as a segment with a
unique name; the file is complete or absent. Nothing is appended, nothing is locked, and no writer is central. A damaged
or missing segment costs only its own rows. Reading the ledger means reading the keys of all segments.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engines.types import Completion
from pipeline.storage.exact_json import dumps
from pipeline.storage.filesystem import listing, remove, write_atomic
from pipeline.storage.output_files import SEGMENTS, is_segment
from pipeline.storage.retry import patiently

# `FAN` segments are merged into one, unless together they exceed `FULL_BYTES`.
FAN, FULL_BYTES = 64, 128 << 20
# Rows in a Parquet row group. A merged segment holds hours of a worker's rows, and a part of the output needs few of them:
# it reads only the groups with these rows.
GROUP_ROWS = 4096

# The token counts of `Usage`, in the order of its fields.
TOKENS = ("input", "cached_input", "output", "cache_write", "reasoning")
USAGE = pa.struct([(name, pa.int64()) for name in TOKENS])
ERROR = pa.struct([("type", pa.string()), ("message", pa.string()), ("status", pa.int64()), ("retryable", pa.bool_())])


def _usage(completion: Completion) -> dict[str, int] | None:
    """The token counts; None if no try was answered or reported its usage."""
    usage = completion.usage
    if not (usage.input or usage.output) and (completion.error or not usage.known):
        return None
    return {name: getattr(usage, name) for name in TOKENS}


def _json(value: Any) -> str | None:
    return dumps(value).decode() if value else None


def _message_fields(completion: Completion) -> str | None:
    """JSON of the message's fields other than text and tool calls, such as a provider's signed reasoning."""
    message = completion.message
    if message is None or len(message) <= 2:
        return None
    return _json({name: value for name, value in message.items() if name not in ("role", "content", "tool_calls")})


def _choices(completion: Completion) -> str | None:
    """JSON of all answers if more than one was requested (`n`). The first is also in the other columns."""
    if len(completion.choices) < 2:
        return None
    return _json(
        [{"message": c.message, "finish_reason": c.finish_reason, "logprobs": c.logprobs} for c in completion.choices]
    )


def _error(completion: Completion) -> dict[str, Any] | None:
    error = completion.error
    return None if error is None else {name: getattr(error, name) for name in ERROR.names}


# The columns of a completion, in a segment and in the final output: the type, and the value of a completion.
COMPLETION_COLUMNS: dict[str, tuple[pa.DataType, Callable[[Completion], Any]]] = {
    "response": (pa.string(), lambda c: c.text),
    "finish_reason": (pa.string(), lambda c: c.finish_reason),
    "tool_calls": (pa.string(), lambda c: _json(c.tool_calls)),
    "reasoning": (pa.string(), lambda c: c.reasoning),
    "usage": (USAGE, _usage),
    "cost_usd": (pa.float64(), lambda c: c.cost_usd),  # US$ of all tries in this record; null: unknown
    "model": (pa.string(), lambda c: c.model),
    "engine": (pa.string(), lambda c: c.engine),
    "attempts": (pa.int32(), lambda c: c.attempts),
    "latency_s": (pa.float64(), lambda c: c.latency_s),
    "error": (ERROR, _error),
    "choices": (pa.string(), _choices),
    "logprobs": (pa.string(), lambda c: _json(c.logprobs)),
    "dialogue": (pa.string(), lambda c: _json(c.dialogue)),
    "message_fields": (pa.string(), _message_fields),
}
# The columns that finalize reads from a segment.
ANSWER_SCHEMA = pa.schema(
    [*((name, type) for name, (type, _) in COMPLETION_COLUMNS.items()), ("done_at", pa.timestamp("ms", tz="UTC"))]
)
# `superseded`: a try that cost money, or may have, and whose row is asked again. Such a record answers no row.
SEGMENT_SCHEMA = pa.schema([("key", pa.binary(32)), ("id", pa.string()), *ANSWER_SCHEMA, ("superseded", pa.bool_())])


@dataclass(slots=True)
class Record:
    """A finished request, before it is written to a segment."""

    key: bytes
    id: str
    completion: Completion
    done_at: float  # seconds since the epoch
    superseded: bool = False


def completion_columns(completions: Sequence[Completion]) -> list[pa.Array]:
    """The columns of `COMPLETION_COLUMNS`, one value per completion."""
    return [pa.array([value(c) for c in completions], type) for type, value in COMPLETION_COLUMNS.values()]


def write_segment(fs: pafs.FileSystem, root: str, writer: str, records: Sequence[Record]) -> str:
    """Writes `records` durably as one new segment. Returns its path."""
    columns = [
        pa.array([r.key for r in records], pa.binary(32)),
        pa.array([r.id for r in records], pa.string()),
        *completion_columns([r.completion for r in records]),
        pa.array([int(r.done_at * 1000) for r in records], pa.timestamp("ms", tz="UTC")),
        pa.array([r.superseded for r in records], pa.bool_()),
    ]
    return _put(fs, root, writer, pa.Table.from_arrays(columns, schema=SEGMENT_SCHEMA))


def _put(fs: pafs.FileSystem, root: str, writer: str, table: pa.Table) -> str:
    sink = io.BytesIO()
    # The keys are random bytes, so a dictionary or statistics for them would cost time and save nothing.
    options = {"use_dictionary": ["finish_reason", "model", "engine"], "write_statistics": False}
    pq.write_table(table, sink, compression="zstd", row_group_size=GROUP_ROWS, **options)
    path = f"{root}/{SEGMENTS}/{writer}-{uuid.uuid4().hex[:12]}.parquet"
    write_atomic(fs, path, sink.getvalue())
    return path


class Compactor:
    """Merges the segments of one writer, so that a long run leaves few: one day with `flush_s=2` would leave 43,000 files.

    `FAN` segments of one level become one of the next level, unless together they exceed `FULL_BYTES`. The merged segment
    is complete before the old ones are deleted: a reader may see a row twice, but always sees it.
    """

    def __init__(self, fs: pafs.FileSystem, root: str, writer: str) -> None:
        self.fs, self.root, self.writer = fs, root, writer
        self.levels: list[list[str]] = []

    def add(self, path: str, level: int = 0) -> None:
        """Registers a new segment and merges a full level. Raises `OSError` if merging fails; nothing is lost then."""
        if level == len(self.levels):
            self.levels.append([])
        self.levels[level].append(path)
        if len(self.levels[level]) < FAN:
            return
        paths, self.levels[level] = self.levels[level], []
        if sum(info.size for info in patiently(lambda: self.fs.get_file_info(paths))) > FULL_BYTES:
            return
        table = pa.concat_tables(read_segment(self.fs, path) for path in paths)
        merged = _put(self.fs, self.root, self.writer, table)
        for old in paths:
            remove(self.fs, old)
        self.add(merged, level + 1)


def list_segments(fs: pafs.FileSystem, root: str) -> list[str]:
    """The paths of all segments, sorted."""
    return sorted(f.path for f in listing(fs, f"{root}/{SEGMENTS}") if f.is_file and is_segment(f.base_name))


def read_segment(fs: pafs.FileSystem, path: str) -> pa.Table:
    """One segment with all columns of `SEGMENT_SCHEMA`."""
    return _conformed(patiently(lambda: read_columns(fs, path)), SEGMENT_SCHEMA)


def _conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with this schema. Columns and counts of `usage` that an earlier version did not write are null."""
    for part in schema:
        if part.name not in table.column_names:
            table = table.append_column(part, pa.nulls(len(table), part.type))
    at = table.column_names.index("usage")
    if table.schema.field(at).type != USAGE:
        table = table.set_column(at, "usage", _as_usage(table["usage"].combine_chunks()))
    return table.select(schema.names).cast(schema)


def _as_usage(usage: pa.StructArray) -> pa.StructArray:
    names = [field.name for field in usage.type]
    counts = [pc.struct_field(usage, name) if name in names else pa.nulls(len(usage), pa.int64()) for name in TOKENS]
    return pa.StructArray.from_arrays(counts, fields=list(USAGE), mask=pc.is_null(usage))


def read_rows(fs: pafs.FileSystem, path: str, rows: npt.NDArray[np.int32]) -> pa.Table:
    """The columns of `ANSWER_SCHEMA` for the rows with these numbers in a segment, in the order of `rows`."""
    return _conformed(patiently(lambda: _read_rows(fs, path, rows)), ANSWER_SCHEMA)


def _read_rows(fs: pafs.FileSystem, path: str, rows: npt.NDArray[np.int32]) -> pa.Table:
    with fs.open_input_file(path) as stream:
        file = pq.ParquetFile(stream)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        group_of = np.searchsorted(ends, rows, side="right")
        groups = np.unique(group_of)
        read = np.array(sizes)[groups]
        # For each group: its first row in the file, minus its first row among the rows that are read.
        shift = np.zeros(len(sizes), np.int64)
        shift[groups] = (ends[groups] - read) - (np.cumsum(read) - read)
        table = file.read_row_groups(groups.tolist(), columns=ANSWER_SCHEMA.names)
    return table.take(pa.array(rows - shift[group_of]))


def read_columns(fs: pafs.FileSystem, path: str, columns: list[str] | None = None) -> pa.Table:
    with fs.open_input_file(path) as file:
        return pq.ParquetFile(file).read(columns=columns)
