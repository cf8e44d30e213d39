"""The ledger records which requests are answered. It consists of segments only.

A segment is a small immutable Parquet file under `_segments/`. A worker writes its finished requests as a segment with a
unique name; the file is complete or absent. No file is appended to, and there is no lock and no central writer. A
missing segment costs only its own rows, and so does one whose keys are damaged. If only other columns are damaged, the run
stops before it writes the output and names the file, because the user may have a copy of it. Reading the ledger means
reading the keys of all segments.
"""

from __future__ import annotations

import io
import itertools
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engines.errors import Failure
from engines.text import encodable, one_line
from engines.types import Completion
from pipeline.storage.exact_json import dumps
from pipeline.storage.filesystem import listing, remove, write_atomic
from pipeline.storage.output_files import SEGMENTS, is_segment
from pipeline.storage.retry import patiently, steadily, store_failed

# `FAN` segments are merged into one, unless together they exceed `FULL_BYTES`.
FAN, FULL_BYTES = 64, 128 << 20
# The maximum rows, and bytes of values, of a Parquet row group. A merged segment holds hours of a worker's rows. A part of
# the output needs few of these rows, and reads only their row groups.
GROUP_ROWS, GROUP_BYTES = 4096, 16 << 20
# Metadata of a segment: the version of the keys in it. Segments of version 1 have none.
KEY_VERSION = {b"eagleray.keys": b"2"}
# Metadata of a segment with embeddings: their lengths, with commas between.
LENGTHS = b"eagleray.lengths"

# Names of segments with answers from provider batches begin with this word.
BATCH_SEGMENT_PREFIX = "batch"

# The token counts of `Usage`, in the order of its fields.
TOKENS = ("input", "cached_input", "output", "cache_write", "reasoning")
USAGE = pa.struct([(name, pa.int64()) for name in TOKENS])
ERROR = pa.struct([("type", pa.string()), ("message", pa.string()), ("status", pa.int64()), ("retryable", pa.bool_())])


def _usages(completions: Sequence[Completion]) -> pa.Array:
    """The token counts. Null if no try was answered, or no answer reported its usage."""
    usages = [completion.usage for completion in completions]
    unknown = [
        not (usage.input or usage.output) and (completion.error is not None or not usage.known)
        for usage, completion in zip(usages, completions, strict=True)
    ]
    counts = [pa.array(list(map(attrgetter(name), usages)), pa.int64()) for name in TOKENS]
    return pa.StructArray.from_arrays(counts, fields=list(USAGE), mask=pa.array(unknown, pa.bool_()))


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


def _each(value: Callable[[Completion], Any]) -> Callable[[Sequence[Completion]], list[Any]]:
    return lambda completions: list(map(value, completions))


# The columns that an engine fills: the type of each, and its values for completions. Segments have all of them; data/ has
# all except `LEDGER_ONLY`, in this order.
COMPLETION_COLUMNS: dict[str, tuple[pa.DataType, Callable[[Sequence[Completion]], Any]]] = {
    "response": (pa.string(), _each(lambda c: c.text)),
    "finish_reason": (pa.string(), _each(lambda c: c.choices[0].finish_reason if c.choices else None)),
    "tool_calls": (pa.string(), _each(lambda c: _json(c.tool_calls))),
    "reasoning": (pa.string(), _each(attrgetter("reasoning"))),
    "usage": (USAGE, _usages),
    "cost_usd": (pa.float64(), _each(attrgetter("cost_usd"))),  # US$ of all tries in this record; null: unknown
    "model": (pa.string(), _each(attrgetter("model"))),
    "engine": (pa.string(), _each(attrgetter("engine"))),
    "attempts": (pa.int32(), _each(attrgetter("attempts"))),
    "latency_s": (pa.float64(), _each(attrgetter("latency_s"))),
    "error": (ERROR, _each(_error)),
    "choices": (pa.string(), _each(_choices)),
    "logprobs": (pa.string(), _each(lambda c: _json(c.logprobs))),
    "dialogue": (pa.string(), _each(lambda c: _json(c.dialogue))),
    "message_fields": (pa.string(), _each(_message_fields)),
    "queued_s": (pa.float64(), _each(attrgetter("queued_s"))),
}
# Only in the ledger. The first two are parts of `messages` in data/; the report uses the third.
LEDGER_ONLY = frozenset(("dialogue", "message_fields", "queued_s"))
_SCORES = pa.list_(pa.struct([("label", pa.string()), ("score", pa.float64())]))
_RANKING = pa.list_(pa.struct([("index", pa.int64()), ("score", pa.float64())]))
# The columns of tasks other than a chat (`TaskKind.columns`). A segment has those of which it has a value.
VALUE_COLUMNS: dict[str, pa.DataType] = {
    "embedding": pa.list_(pa.float32()),
    "label": pa.string(),
    "scores": _SCORES,
    "score": pa.float64(),
    "ranking": _RANKING,
    "loglikelihood": pa.float64(),
    "tokens": pa.int64(),
    "perplexity": pa.float64(),
    "token_logprobs": pa.list_(pa.float64()),
}
# The columns that finalize reads from every segment.
ANSWER_SCHEMA = pa.schema(
    [*((name, type) for name, (type, _) in COMPLETION_COLUMNS.items()), ("done_at", pa.timestamp("ms", tz="UTC"))]
)
# `superseded`: the record is of a try that cost money, or may have, and the row is asked again. It answers no row.
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
    found = [(values(completions), type) for type, values in COMPLETION_COLUMNS.values()]
    return [values if isinstance(values, pa.Array) else pa.array(values, type) for values, type in found]


def value_columns(completions: Sequence[Completion]) -> dict[str, pa.Array]:
    """The columns of `VALUE_COLUMNS` of which a completion has a value. Chats have none."""
    names = {name for c in completions if c.values for name in c.values}
    return {
        name: pa.array([c.values.get(name) for c in completions], type)
        for name, type in VALUE_COLUMNS.items()
        if name in names
    }


def write_segment(fs: pafs.FileSystem, root: str, writer: str, records: Sequence[Record]) -> str:
    """Writes `records` durably as one new segment. Returns its path.

    A record that cannot be written gets a failure in the place of its completion, so that the others are not lost.
    """
    try:
        table = _table_of(records)
    except Exception:  # of Arrow, of the JSON writers, and of values with a wrong type
        for record in records:
            _make_writable(record)
        table = _table_of(records)
    return _put(fs, root, writer, [table], table.schema)


def _table_of(records: Sequence[Record]) -> pa.Table:
    values = value_columns([r.completion for r in records])
    columns = [
        pa.array([r.key for r in records], pa.binary(32)),
        pa.array([r.id for r in records], pa.string()),
        *completion_columns([r.completion for r in records]),
        pa.array([int(r.done_at * 1000) for r in records], pa.timestamp("ms", tz="UTC")),
        pa.array([r.superseded for r in records], pa.bool_()),
        *values.values(),
    ]
    return pa.Table.from_arrays(columns, schema=with_values(SEGMENT_SCHEMA, values))


def _make_writable(record: Record) -> None:
    """Replaces what no segment can hold, such as a text with half of a UTF-16 pair. An answer that is replaced keeps its
    cost and, if possible, its tokens: they are paid."""
    given = record.completion
    record.id = encodable(record.id)
    given.model, given.engine = (encodable(name) if isinstance(name, str) else None for name in (given.model, given.engine))
    if given.error is not None:
        given.error = replace(given.error, message=encodable(given.error.message))
    try:
        _table_of([record])
        return
    except Exception as error:
        reason = f"the answer cannot be stored: {type(error).__name__}: {one_line(error)}"
    least = Completion(
        model=given.model,
        engine=given.engine,
        attempts=given.attempts,
        cost_usd=given.cost_usd,
        error=given.error or Failure("bad_response", reason),
    )
    record.completion = replace(least, usage=given.usage, latency_s=given.latency_s, queued_s=given.queued_s)
    try:
        _table_of([record])
    except Exception:  # a server reported more tokens than a column can hold
        record.completion = least


def with_values(schema: pa.Schema, names: Container[str]) -> pa.Schema:
    """The schema with those columns of `VALUE_COLUMNS` that have one of the names."""
    return pa.schema([*schema, *((name, type) for name, type in VALUE_COLUMNS.items() if name in names)])


def _put(
    fs: pafs.FileSystem, root: str, writer: str, tables: Iterable[pa.Table], schema: pa.Schema = SEGMENT_SCHEMA
) -> str:
    """Writes one segment. The memory holds the file, one row group, and one of the tables."""
    lengths = set[int]()
    sink = io.BytesIO()
    # The keys are random bytes, so a dictionary or statistics for them would cost time and save nothing.
    options = {"use_dictionary": ["finish_reason", "model", "engine"], "write_statistics": False}
    with pq.ParquetWriter(sink, schema.with_metadata(KEY_VERSION), compression="zstd", **options) as file:
        for group in _groups(tables):
            file.write_table(group.replace_schema_metadata(KEY_VERSION), row_group_size=GROUP_ROWS)
            if "embedding" in schema.names:
                lengths.update(pc.unique(pc.list_value_length(group["embedding"]).drop_null()).to_pylist())
        if lengths:
            file.add_key_value_metadata({LENGTHS.decode(): ",".join(map(str, sorted(lengths)))})
    path = f"{root}/{SEGMENTS}/{writer}-{uuid.uuid4().hex[:12]}.parquet"
    write_atomic(fs, path, sink.getbuffer())
    return path


def _groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Divides the rows of all tables into tables of one row group each."""
    waiting: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        step = max(1, min(GROUP_ROWS, GROUP_BYTES * len(table) // max(1, table.nbytes)))
        for part in (table.slice(at, step) for at in range(0, len(table), step)):
            if waiting and (rows + len(part) > GROUP_ROWS or size + part.nbytes > GROUP_BYTES):
                yield pa.concat_tables(waiting)
                waiting, rows, size = [], 0, 0
            waiting.append(part)
            rows, size = rows + len(part), size + part.nbytes
    if waiting:
        yield pa.concat_tables(waiting)


class Compactor:
    """Merges the segments of one writer, so that a long run leaves few. Otherwise one day with `flush_s=2` leaves 43,000
    files.

    `FAN` segments of one level become one of the next level, unless together they exceed `FULL_BYTES`. The merged segment
    is complete before the old ones are deleted: a reader may see a row twice, but never misses one.
    """

    def __init__(self, fs: pafs.FileSystem, root: str, writer: str) -> None:
        self.fs, self.root, self.writer = fs, root, writer
        self.levels: list[list[str]] = []

    def add(self, path: str, level: int = 0) -> None:
        """Registers a new segment and merges a full level. Raises if merging fails; no record is lost then.

        Raises `OSError` for a failing store; for a damaged segment also pyarrow's errors, `LookupError`, `TypeError` or
        `ValueError`.
        """
        if level == len(self.levels):
            self.levels.append([])
        self.levels[level].append(path)
        if len(self.levels[level]) < FAN:
            return
        paths, self.levels[level] = self.levels[level], []
        if sum(info.size for info in patiently(lambda: self.fs.get_file_info(paths))) > FULL_BYTES:
            return
        with ThreadPoolExecutor(8) as pool:
            names = set().union(*pool.map(lambda path: patiently(partial(_column_names, self.fs, path)), paths))
        schema = with_values(SEGMENT_SCHEMA, names)
        tables = itertools.chain.from_iterable(_read_groups(self.fs, path, schema) for path in paths)
        merged = _put(self.fs, self.root, self.writer, tables, schema)
        remove(self.fs, *paths)
        self.add(merged, level + 1)


def list_segments(fs: pafs.FileSystem, root: str) -> list[str]:
    """The paths of all segments, sorted."""
    return sorted(f.path for f in listing(fs, f"{root}/{SEGMENTS}") if f.is_file and is_segment(f.base_name))


def is_batch_segment(path: str) -> bool:
    """True if the answers in this segment came from provider batches."""
    return path.rsplit("/", 1)[-1].startswith(f"{BATCH_SEGMENT_PREFIX}-")


def _column_names(fs: pafs.FileSystem, path: str) -> list[str]:
    with fs.open_input_file(path) as file:
        names: list[str] = pq.read_schema(file).names
        return names


def _read_groups(fs: pafs.FileSystem, path: str, schema: pa.Schema) -> Iterator[pa.Table]:
    """The row groups of a segment, with this schema."""

    def groups() -> Iterator[pa.Table]:
        with fs.open_input_file(path) as stream:
            file = pq.ParquetFile(stream)
            for group in range(file.metadata.num_row_groups):
                yield _conformed(file.read_row_group(group), schema)

    return steadily(groups)


def read_segment(fs: pafs.FileSystem, path: str) -> pa.Table:
    """One segment with all columns of `SEGMENT_SCHEMA`, and the columns of tasks that it has."""
    table = patiently(lambda: read_columns(fs, path))
    return _conformed(table, with_values(SEGMENT_SCHEMA, table.column_names))


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


def read_rows(fs: pafs.FileSystem, path: str, rows: npt.NDArray[np.int32], schema: pa.Schema = ANSWER_SCHEMA) -> pa.Table:
    """The columns of `schema` for the rows with these numbers in a segment, in the order of `rows`."""
    return _conformed(patiently(lambda: _read_rows(fs, path, rows, schema)), schema)


def _read_rows(fs: pafs.FileSystem, path: str, rows: npt.NDArray[np.int32], schema: pa.Schema) -> pa.Table:
    with fs.open_input_file(path) as stream:
        file = pq.ParquetFile(stream)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        group_of = np.searchsorted(ends, rows, side="right")
        order = np.argsort(group_of, kind="stable")
        tables = []
        for group in np.unique(group_of).tolist():  # one at a time: together they may be large
            wanted = rows[group_of == group] - (ends[group] - sizes[group])
            tables.append(file.read_row_group(group, columns=schema.names).take(pa.array(wanted)))
    back = np.empty(len(rows), np.int64)
    back[order] = np.arange(len(rows))
    return pa.concat_tables(tables).take(pa.array(back))


def read_columns(fs: pafs.FileSystem, path: str, columns: list[str] | None = None) -> pa.Table:
    with fs.open_input_file(path) as file:
        return pq.ParquetFile(file).read(columns=columns)


def is_damaged(fs: pafs.FileSystem, path: str, error: Exception) -> bool:
    """True if `error` came from the content of a segment, and not from the disk or store: all bytes of the file can be
    read."""
    if store_failed(error):
        return False
    try:
        patiently(lambda: _read_through(fs, path))
    except OSError:
        return False
    return True


def _read_through(fs: pafs.FileSystem, path: str) -> None:
    with fs.open_input_stream(path, compression=None) as stream:
        while stream.read(8 << 20):
            pass


# Columns that every version has written.
_OLDEST = frozenset(("key", "error", "done_at", "usage"))


def read_records(fs: pafs.FileSystem, path: str, columns: list[str]) -> pa.Table | None:
    """Some columns of a segment's records, as far as the segment has them: older versions wrote fewer. None if the file is
    torn, or another program's."""
    try:
        table = read_columns(fs, path, columns)
    except (OSError, pa.ArrowException) as error:
        if is_damaged(fs, path, error):  # its rows will be sent again
            return None
        raise
    wanted = {name.partition(".")[0] for name in columns}
    return table if _OLDEST & wanted <= set(table.column_names) else None


def distinct_records(
    key: npt.NDArray[np.uint64], done_at: npt.NDArray[Any], superseded: npt.NDArray[Any]
) -> npt.NDArray[np.int64]:
    """The positions of the records without copies. A record can exist twice while its segment is merged."""
    identity = np.stack([key, done_at.astype(np.uint64), superseded.astype(np.uint64)], axis=1)
    return np.unique(identity, axis=0, return_index=True)[1]


def read_segment_columns(fs: pafs.FileSystem, path: str, columns: list[str]) -> tuple[pa.Table, int]:
    """Some columns of a segment, with the segment's metadata; and the approximate bytes in memory of one row with all
    columns."""
    with fs.open_input_file(path) as stream:
        file = pq.ParquetFile(stream)
        size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
        return file.read(columns=columns), size // max(1, file.metadata.num_rows)
