"""The ledger: which requests are answered. Segments are its only form.

A worker writes what it finished as small immutable Parquet files under `_segments/`, each under a name nobody else
uses, complete or not there at all. Nothing is appended, nothing locked, no writer is central, and a file that is torn
or missing costs its own rows only. Reading the ledger is reading the keys of all segments.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Sequence
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
from pipeline.storage.filesystem import listing, write_atomic
from pipeline.storage.output_files import SEGMENTS, is_segment
from pipeline.storage.retry import patiently

# So many segments become one, while they have less than so many bytes.
FAN, FULL_BYTES = 64, 128 << 20
# A merged segment holds hours of one worker, of which a part of the output wants seconds: it reads these groups only.
GROUP_ROWS = 4096

# The token counts of `Usage`, in its order.
TOKENS = ("input", "cached_input", "output", "cache_write", "reasoning")
USAGE = pa.struct([(name, pa.int64()) for name in TOKENS])
ERROR = pa.struct([("type", pa.string()), ("message", pa.string()), ("status", pa.int64()), ("retryable", pa.bool_())])

# What a completion becomes, in a segment and in the final output alike.
COMPLETION_FIELDS = [
    ("response", pa.string()),
    ("finish_reason", pa.string()),
    ("tool_calls", pa.string()),
    ("reasoning", pa.string()),
    ("usage", USAGE),
    ("cost_usd", pa.float64()),  # of all tries in this record; null: not known
    ("model", pa.string()),
    ("engine", pa.string()),
    ("attempts", pa.int32()),
    ("latency_s", pa.float64()),
    ("error", ERROR),
    ("choices", pa.string()),
    ("logprobs", pa.string()),
    ("dialogue", pa.string()),
    ("message_fields", pa.string()),
]
# What finalize reads of a segment.
ANSWER_SCHEMA = pa.schema([*COMPLETION_FIELDS, ("done_at", pa.timestamp("ms", tz="UTC"))])
# `superseded`: a try that was paid, or may have been, while its row is asked again. It answers no row.
SEGMENT_SCHEMA = pa.schema([("key", pa.binary(32)), ("id", pa.string()), *ANSWER_SCHEMA, ("superseded", pa.bool_())])


@dataclass(slots=True)
class Record:
    """A finished request on its way into a segment."""

    key: bytes
    id: str
    completion: Completion
    done_at: float  # seconds since the epoch
    superseded: bool = False


def completion_columns(completions: Sequence[Completion]) -> list[pa.Array]:
    """The columns of `COMPLETION_FIELDS`, one value per completion."""
    columns = (
        [c.text for c in completions],
        [c.finish_reason for c in completions],
        [_json(c.tool_calls) for c in completions],
        [c.reasoning for c in completions],
        [_usage(c) for c in completions],
        [c.cost_usd for c in completions],
        [c.model for c in completions],
        [c.engine for c in completions],
        [c.attempts for c in completions],
        [c.latency_s for c in completions],
        [c.error and {"type": c.error.type, "message": c.error.message, "status": c.error.status,
                      "retryable": c.error.retryable} for c in completions],
        [_choices(c) for c in completions],
        [_json(c.logprobs) for c in completions],
        [_json(c.dialogue) for c in completions],
        [_message_fields(c) for c in completions],
    )  # fmt: skip
    return [pa.array(values, type) for values, (_, type) in zip(columns, COMPLETION_FIELDS, strict=True)]


def _usage(completion: Completion) -> dict[str, int] | None:
    """None where no try was answered, or none told its usage."""
    usage = completion.usage
    if not (usage.input or usage.output) and (completion.error or not usage.known):
        return None
    return {name: getattr(usage, name) for name in TOKENS}


def _json(value: Any) -> str | None:
    return dumps(value).decode() if value else None


def _message_fields(completion: Completion) -> str | None:
    """What the answer's message has beside its text and its calls, such as a provider's signed reasoning."""
    message = completion.message
    if message is None or len(message) <= 2:
        return None
    return _json({name: value for name, value in message.items() if name not in ("role", "content", "tool_calls")})


def _choices(completion: Completion) -> str | None:
    """All answers where more than one was asked for (`n`); the first also stands in the plain columns."""
    if len(completion.choices) < 2:
        return None
    return _json(
        [{"message": c.message, "finish_reason": c.finish_reason, "logprobs": c.logprobs} for c in completion.choices]
    )


def write_segment(fs: pafs.FileSystem, root: str, writer: str, records: Sequence[Record]) -> str:
    """Makes `records` durable as one new segment and returns its path."""
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
    # The keys are random bytes: a dictionary or statistics for them would only cost time.
    options = {"use_dictionary": ["finish_reason", "model", "engine"], "write_statistics": False}
    pq.write_table(table, sink, compression="zstd", row_group_size=GROUP_ROWS, **options)
    path = f"{root}/{SEGMENTS}/{writer}-{uuid.uuid4().hex[:12]}.parquet"
    write_atomic(fs, path, sink.getvalue())
    return path


class Compactor:
    """Merges one writer's own segments, so that a long run leaves few: a day of `flush_s=2` would be 43,000 files.

    As soon as there are `FAN` of one level they become one of the next, unless they have `FULL_BYTES` already. The merged
    one is whole before the others go: a reader may see rows twice, never less than once.
    """

    def __init__(self, fs: pafs.FileSystem, root: str, writer: str) -> None:
        self.fs, self.root, self.writer = fs, root, writer
        self.levels: list[list[str]] = []

    def add(self, path: str, level: int = 0) -> None:
        """Takes note of a new segment. Raises `OSError` where merging fails, with nothing lost."""
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
            self.fs.delete_file(old)
        self.add(merged, level + 1)


def list_segments(fs: pafs.FileSystem, root: str) -> list[str]:
    """The paths of all segments, sorted."""
    return sorted(f.path for f in listing(fs, f"{root}/{SEGMENTS}") if f.is_file and is_segment(f.base_name))


def read_segment(fs: pafs.FileSystem, path: str) -> pa.Table:
    """One whole segment."""
    return _conformed(patiently(lambda: read_columns(fs, path)), SEGMENT_SCHEMA)


def _conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table in this schema; columns, and counts of `usage`, that an earlier version did not write are null."""
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
    """The columns of `ANSWER_SCHEMA` of some rows of a segment, in the order given."""
    return _conformed(patiently(lambda: _read_rows(fs, path, rows)), ANSWER_SCHEMA)


def _read_rows(fs: pafs.FileSystem, path: str, rows: npt.NDArray[np.int32]) -> pa.Table:
    with fs.open_input_file(path) as stream:
        file = pq.ParquetFile(stream)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        group_of = np.searchsorted(ends, rows, side="right")
        groups = np.unique(group_of)
        read = np.array(sizes)[groups]
        # Where each group begins, in the file and in what was read of it.
        shift = np.zeros(len(sizes), np.int64)
        shift[groups] = (ends[groups] - read) - (np.cumsum(read) - read)
        table = file.read_row_groups(groups.tolist(), columns=ANSWER_SCHEMA.names)
    return table.take(pa.array(rows - shift[group_of]))


def read_columns(fs: pafs.FileSystem, path: str, columns: list[str] | None = None) -> pa.Table:
    with fs.open_input_file(path) as file:
        return pq.ParquetFile(file).read(columns=columns)
