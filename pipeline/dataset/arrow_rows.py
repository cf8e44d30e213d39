"""Reads rows from Parquet and Arrow files. Their columns have types, which the output keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from operator import methodcaller
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engines.text import one_line
from pipeline.dataset.file_split import BATCH_BYTES, FileSplit, Partition, RawRow
from pipeline.dataset.formats import ArrowRow
from pipeline.dataset.tables import lance_batches, lance_schema
from pipeline.storage.filesystem import resolve
from pipeline.storage.retry import store_failed

ARROW_FILE = b"ARROW1"
# The first bytes of an Arrow stream: a marker, then the length of the schema's message, which is below 16 MB.
_STREAM, _MESSAGE_END = b"\xff\xff\xff\xff", b"\0"

# Converts an array whose values have no parts.
Leaf = Callable[[pa.Array], list[Any]]

# Bytes of one read of a column in a large row group.
PIECE_BYTES = 1 << 20


class Batch(NamedTuple):
    row: int  # the number in the file of the first row
    batch: pa.RecordBatch
    error: str = ""  # the reason why the rows from `row` on are missing; then `batch` is one row of nulls


def is_arrow(head: bytes) -> bool:
    """True if a file with this beginning is an Arrow file or an Arrow stream."""
    return head.startswith(ARROW_FILE) or (head[:4] == _STREAM and head[7:8] == _MESSAGE_END)


def open_arrow(file: pa.NativeFile) -> pa.RecordBatchReader | pa.RecordBatchFileReader:
    head = file.read(len(ARROW_FILE))
    file.seek(0)
    return pa.ipc.open_file(file) if head == ARROW_FILE else pa.ipc.open_stream(file)


def table_schema(file_split: FileSplit) -> pa.Schema:
    """The schema of a file split's batches. Raises the error of pyarrow if the file is missing."""
    if file_split.kind == "lance":
        return lance_schema(file_split).remove_metadata()
    fs, path = resolve(file_split.file)
    with fs.open_input_file(path) as stream:
        schema = pq.ParquetFile(stream).schema_arrow if file_split.kind == "parquet" else open_arrow(stream).schema
    for name, value in _missing(schema, file_split.partition):
        schema = schema.append(pa.field(name, value.type))
    return schema.remove_metadata()


def parquet_rows(file_split: FileSplit) -> int:
    """The number of rows of a Parquet file split, from the file's metadata."""
    fs, path = resolve(file_split.file)
    with fs.open_input_file(path) as stream:
        about = pq.ParquetFile(stream).metadata
        return sum(about.row_group(group).num_rows for group in range(file_split.start, file_split.stop))


def batches(file_split: FileSplit, batch_rows: int) -> Iterator[Batch]:
    """The batches of a file split. Of damaged rows: a batch with an error."""
    given = {"parquet": _parquet_batches, "arrow": _arrow_batches, "lance": _lance_batches}[file_split.kind]
    for row, batch, error in given(file_split, batch_rows):
        for name, value in _missing(batch.schema, file_split.partition):
            batch = batch.append_column(name, pa.repeat(value, batch.num_rows))
        yield Batch(row, batch, error)


def _missing(schema: pa.Schema, partition: Partition) -> Partition:
    """The columns of the file's directories that the file does not have itself."""
    return tuple((name, value) for name, value in partition if name not in schema.names)


def _parquet_batches(file_split: FileSplit, batch_rows: int) -> Iterator[Batch]:
    row, schema = file_split.first_row, pa.schema([])
    try:
        fs, path = resolve(file_split.file)
        with fs.open_input_file(path) as stream:
            file = _parquet_file(stream)
            schema = file.schema_arrow
            for group in range(file_split.start, file_split.stop):
                about = file.metadata.row_group(group)
                end = row + about.num_rows
                row_bytes = about.total_byte_size // max(1, about.num_rows)
                try:
                    for batch in file.iter_batches(max(1, min(batch_rows, BATCH_BYTES // max(1, row_bytes))), [group]):
                        yield Batch(row, batch)
                        row += batch.num_rows
                except (OSError, ValueError, pa.ArrowException) as error:
                    if store_failed(error):
                        raise
                    reason = f"the Parquet file is damaged ({one_line(error)}): its rows {row + 1:,} to {end:,} are missing"
                    yield _error(row, schema, reason)
                row = end
    except (OSError, ValueError, pa.ArrowException) as error:
        if store_failed(error):
            raise
        yield _error(row, schema, f"the Parquet file cannot be read ({one_line(error)}): {_from_here(row)}")


def _parquet_file(stream: pa.NativeFile) -> pq.ParquetFile:
    """By default, Arrow reads a whole row group at once, in few requests. If a row group is large, such as one with images,
    each column is read in pieces. A page is always read as a whole."""
    about = pq.read_metadata(stream)
    sizes = (about.row_group(group).total_byte_size for group in range(about.num_row_groups))
    if max(sizes, default=0) <= 2 * BATCH_BYTES:
        return pq.ParquetFile(stream, metadata=about)
    return pq.ParquetFile(stream, metadata=about, pre_buffer=False, buffer_size=PIECE_BYTES)


def _arrow_batches(file_split: FileSplit, batch_rows: int) -> Iterator[Batch]:
    row, schema = 0, pa.schema([])
    try:
        fs, path = resolve(file_split.file)
        with fs.open_input_file(path) as stream:
            reader = open_arrow(stream)
            schema = reader.schema
            for batch in _record_batches(reader):
                size = max(1, min(batch_rows, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
                for at in range(0, batch.num_rows, size):
                    part = batch.slice(at, size)
                    yield Batch(row, part)
                    row += part.num_rows
    except (OSError, ValueError, pa.ArrowException) as error:
        if store_failed(error):
            raise
        yield _error(row, schema, f"the Arrow file cannot be read ({one_line(error)}): {_from_here(row)}")


def _lance_batches(file_split: FileSplit, batch_rows: int) -> Iterator[Batch]:
    row, schema = file_split.first_row, pa.schema([])
    try:
        schema = lance_schema(file_split)
        for batch in lance_batches(file_split, batch_rows):
            yield Batch(row, batch)
            row += batch.num_rows
    except (OSError, ValueError, pa.ArrowException) as error:
        if store_failed(error):
            raise
        yield _error(row, schema, f"the Lance table cannot be read ({one_line(error)}): {_from_here(row)}")


def _record_batches(reader: Any) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.RecordBatchFileReader):
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        with contextlib.suppress(StopIteration):
            while True:
                yield reader.read_next_batch()


def _from_here(row: int) -> str:
    return f"rows from {row + 1:,} on are missing"


def _error(row: int, schema: pa.Schema, reason: str) -> Batch:
    return Batch(row, pa.RecordBatch.from_struct_array(pa.nulls(1, pa.struct(schema))), reason)


def rows_of(first_row: int, batch: pa.RecordBatch) -> list[RawRow]:
    """Converts a batch to Python values. A row with a value that Python cannot represent (the year 10000, invalid UTF-8)
    has an error."""
    try:
        if batch.num_rows == 1 or not batch.num_columns:  # the errors of `to_pylist` say more
            return [RawRow(number, ArrowRow(columns)) for number, columns in enumerate(batch.to_pylist(), first_row)]
        rows, names = zip(*map(to_values, batch.columns), strict=True), batch.schema.names
        return [RawRow(number, ArrowRow(zip(names, row, strict=True))) for number, row in enumerate(rows, first_row)]
    except Exception as error:  # pyarrow raises several types here
        if batch.num_rows == 1:
            return [RawRow(first_row, None, f"{type(error).__name__}: {one_line(error)}")]
        return [row for at in range(batch.num_rows) for row in rows_of(first_row + at, batch.slice(at, 1))]


def to_values(array: pa.Array | pa.ChunkedArray, leaf: Leaf = methodcaller("to_pylist")) -> list[Any]:
    """As `to_pylist`, which makes an object of Arrow for each value. Takes a third of the time for most types. `leaf` is
    called for other types, also inside structs and lists."""
    if isinstance(array, pa.ChunkedArray):
        return [value for chunk in array.chunks for value in to_values(chunk, leaf)]
    kind, is_a = array.type, pa.types
    is_number = is_a.is_integer(kind) or is_a.is_float32(kind) or is_a.is_float64(kind)
    is_text = is_a.is_string(kind) or is_a.is_large_string(kind) or is_a.is_binary(kind) or is_a.is_fixed_size_binary(kind)
    values: list[Any]
    if is_text or (is_number and not array.null_count):  # NumPy's numbers have no null
        try:
            values = array.to_numpy(zero_copy_only=False).tolist()
        except (UnicodeDecodeError, pa.ArrowException):
            values = leaf(array)
    elif is_a.is_struct(kind) and kind.num_fields == len(names := {part.name: None for part in kind}) and names:
        rows = zip(*(to_values(part, leaf) for part in array.flatten()), strict=True)
        values = [dict(zip(names, row, strict=True)) for row in rows]
        for at in np.flatnonzero(np.asarray(array.is_null())).tolist() if array.null_count else ():
            values[at] = None
    elif is_a.is_list(kind) or is_a.is_large_list(kind):
        items, end = to_values(array.flatten(), leaf), 0
        lengths = to_values(array.value_lengths())
        values = [None if length is None else items[end : (end := end + length)] for length in lengths]
    else:
        values = leaf(array)
    return values


def readable_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """As `to_values`, with text in the place of each value that Python cannot represent (the year 10000, invalid UTF-8).
    None if there is no text for it, as inside a map."""
    return to_values(array, _readable)


def readable_rows(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows, with values as `readable_values` gives them."""
    if not table.num_columns:
        return [{} for _ in range(table.num_rows)]
    columns = map(readable_values, table.columns)
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _readable(array: pa.Array) -> list[Any]:
    try:
        return array.to_pylist()
    except Exception:  # pyarrow raises several types here
        if len(array) > 1:
            return [value for at in range(len(array)) for value in _readable(array.slice(at, 1))]
    with contextlib.suppress(pa.ArrowException):
        return [value.decode("utf-8", "backslashreplace") for value in array.cast(pa.binary()).to_pylist()]
    with contextlib.suppress(pa.ArrowException):
        return array.cast(pa.string()).to_pylist()
    return [None]
