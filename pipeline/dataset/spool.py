"""Rows that a program gives to a run. They are written once into a dataset file inside the output.

The path of the file contains a digest of the rows. So a run with the same rows continues, and one with other rows is
refused, like another dataset. The file is read like any other one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engines.errors import ConfigError, ErrorCode
from engines.text import one_line
from engines.types import Conversation
from pipeline.storage.exact_json import dumps, finite, plain
from pipeline.storage.filesystem import child, remove, resolve
from pipeline.storage.output_files import dataset_file, drop_directories, keep_rows

# Rows of a table that are hashed at once. A fixed number, because the digest must not depend on the table's chunks.
HASHED_ROWS = 256
# A row group ends at this many bytes, to bound the memory of readers.
GROUP_BYTES = 16 << 20
# Fields of a conversation that a row of a dataset cannot have.
_NO_COLUMNS = ("extra_body", "continue_answer")


@dataclass(frozen=True, slots=True)
class Spool:
    """A complete dataset file on this machine, outside the output."""

    path: str
    name: str  # its path below the output

    def place(self, output: str) -> bool:
        """Copies the file into the output. Returns False if it is there already."""
        return keep_rows(*resolve(self.target(output)), Path(self.path))

    def target(self, output: str) -> str:
        """The path of the file in the output."""
        target = child(output, self.name)
        fs, inner = resolve(target)
        return inner if isinstance(fs, pafs.LocalFileSystem) else target

    def remove(self, output: str) -> None:
        """Removes the file from the output, and its directories on a disk."""
        fs, inner = resolve(self.target(output))
        remove(fs, inner)
        drop_directories(fs, inner)


@contextlib.contextmanager
def spooled(data: Any) -> Iterator[Spool]:
    """Writes a table, a frame or an iterable of rows into a temporary dataset file, which goes away at the end. Memory is
    bounded. Raises `ConfigError` for data that is no dataset."""
    with tempfile.TemporaryDirectory(prefix="eagleray-") as folder:
        reader = _reader(data)
        kind = "jsonl" if reader is None else "parquet"
        path = Path(folder, f"rows.{kind}")
        with path.open("xb") as file:
            digest = _write_lines(file, data) if reader is None else _write_table(file, reader)
        yield Spool(str(path), dataset_file(digest, kind))


# -- tables and frames ------------------------------------------------------------------------------------------------


def _reader(data: Any) -> pa.RecordBatchReader | None:
    """The batches of a table or frame; None for an iterable of rows. pandas, Polars, DuckDB and others export Arrow."""
    try:
        if type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "columns"):
            named = any(name is not None for name in data.index.names)  # an index without a name counts the rows
            return pa.Table.from_pandas(data, preserve_index=named).to_reader()
        if hasattr(data, "__arrow_c_stream__"):
            return pa.RecordBatchReader.from_stream(data)
        if isinstance(data, pa.RecordBatch):
            return pa.Table.from_batches([data]).to_reader()
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise _wrong(f"this {type(data).__name__} cannot be read as a table: {one_line(error)}") from None
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise _wrong(f"a {type(data).__name__} is not a path, a list of paths, a table, a frame or an iterable of dicts")
    return None


def _write_table(file: BinaryIO, reader: pa.RecordBatchReader) -> str:
    """Writes a Parquet file. Returns the digest of its schema and values."""
    schema = pa.schema([pa.field(field.name, _plain_type(field.type)) for field in reader.schema])
    sink = _Digest()
    try:
        with pq.ParquetWriter(file, schema, compression="zstd") as parquet, pa.ipc.new_stream(sink, schema) as hashed:
            group: list[pa.Table] = []
            for piece in _pieces(reader, schema):
                for batch in piece.to_batches():
                    hashed.write_batch(batch)
                group.append(piece)
                if sum(each.nbytes for each in group) >= GROUP_BYTES:
                    parquet.write_table(pa.concat_tables(group))
                    group = []
            if group:
                parquet.write_table(pa.concat_tables(group))
    except pa.ArrowException as error:
        raise _wrong(f"the table cannot be written as Parquet: {one_line(error)}") from None
    return sink.hash.hexdigest()


def _pieces(reader: pa.RecordBatchReader, schema: pa.Schema) -> Iterator[pa.Table]:
    """All rows, in tables of `HASHED_ROWS` rows. Their buffers have no bytes of other rows, which would be hashed too."""
    rest = schema.empty_table()
    for batch in reader:
        rest = pa.concat_tables([rest, pa.Table.from_batches([batch]).cast(schema)])
        while len(rest) >= HASHED_ROWS:
            yield _copied(rest.slice(0, HASHED_ROWS))
            rest = rest.slice(HASHED_ROWS)
    if len(rest):
        yield _copied(rest)


def _copied(table: pa.Table) -> pa.Table:
    arrays = [pa.concat_arrays([*column.chunks, pa.nulls(0, column.type)]) for column in table.columns]
    return pa.Table.from_arrays(arrays, schema=table.schema)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without views, which Parquet files do not have, and without dictionaries."""
    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain_type(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain_type(kind.value_type)))
    if pa.types.is_dictionary(kind):  # the order of its values may differ from process to process
        return _plain_type(kind.value_type)
    return views.get(kind, kind)


class _Digest:
    """A file that only hashes what is written."""

    closed = False

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...


# -- rows -------------------------------------------------------------------------------------------------------------


def _write_lines(file: BinaryIO, rows: Iterable[Any]) -> str:
    """Writes JSON lines. Returns their digest."""
    digest = hashlib.sha256()
    for number, row in enumerate(rows, 1):
        line = _line(row, number) + b"\n"
        digest.update(line)
        file.write(line)
    return digest.hexdigest()


def _line(row: Any, number: int) -> bytes:
    if isinstance(row, Conversation):
        row = _columns(row, number)
    if not isinstance(row, Mapping):
        raise _wrong(f"row {number:,} is a {type(row).__name__}, not a dict or a Conversation")
    row = {str(name): value for name, value in row.items()}
    try:
        if finite(row) is row:
            return dumps(row)
        return json.dumps(row, ensure_ascii=False, default=plain).encode()  # JSON with NaN, which the reader takes
    except (TypeError, ValueError, RecursionError) as error:
        raise _wrong(f"row {number:,} cannot be written as JSON: {one_line(error)}") from None


def _columns(conversation: Conversation, number: int) -> dict[str, Any]:
    """The columns of a conversation, or of the inputs of another task. The key `task` of the run says which task it is."""
    given = {name: value for name, value in dataclasses.asdict(conversation).items() if value not in (None, {}, [], False)}
    if extra := [name for name in _NO_COLUMNS if name in given]:
        raise _wrong(f"row {number:,}: a row of a dataset has no {extra[0]}")
    given.pop("task")
    inputs = given.pop("inputs", {})
    return {**({} if inputs else {"messages": conversation.messages}), **inputs, **given}


def _wrong(text: str) -> ConfigError:
    return ConfigError(f"dataset: {text}", code=ErrorCode.INPUT_FILES)
