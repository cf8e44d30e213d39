"""The file formats of `eagleray export`. Each writes tables with one schema to a stream."""

from __future__ import annotations

from typing import BinaryIO, Protocol

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from pipeline.dataset.arrow_rows import readable_values
from pipeline.output.export import ExportedRows
from pipeline.storage.exact_json import dumps


class RowFile(Protocol):
    """A file that is being written."""

    def __init__(self, stream: BinaryIO, schema: pa.Schema) -> None: ...

    def add(self, rows: ExportedRows) -> None: ...

    def close(self) -> None: ...


class CSVFile:
    """Comma-separated values with a header. Each field of a struct is a column, such as `usage.input`; a list is JSON."""

    def __init__(self, stream: BinaryIO, schema: pa.Schema) -> None:
        self.writer = pc.CSVWriter(stream, _flat(schema.empty_table()).schema)

    def add(self, rows: ExportedRows) -> None:
        self.writer.write_table(_flat(rows.table))

    def close(self) -> None:
        self.writer.close()


class JSONLFile:
    """JSON lines. The input's own values are written unchanged."""

    def __init__(self, stream: BinaryIO, schema: pa.Schema) -> None:
        self.stream = stream

    def add(self, rows: ExportedRows) -> None:
        self.stream.write(rows.lines())

    def close(self) -> None:
        """Nothing is left to write."""


class ParquetFile:
    """Parquet, with the types of data/."""

    def __init__(self, stream: BinaryIO, schema: pa.Schema) -> None:
        self.writer = pq.ParquetWriter(stream, schema, compression="zstd")

    def add(self, rows: ExportedRows) -> None:
        self.writer.write_table(rows.table)

    def close(self) -> None:
        self.writer.close()


FORMATS: dict[str, type[RowFile]] = {"csv": CSVFile, "jsonl": JSONLFile, "parquet": ParquetFile}


def _flat(table: pa.Table) -> pa.Table:
    """The table with types that CSV can hold."""
    while any(pa.types.is_struct(field.type) for field in table.schema):
        table = table.flatten()
    columns = [_plain(column) for column in table.columns]
    return pa.table(columns, names=_unique(table.column_names))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:  # not UTF-8
            return pa.array(readable_values(column), pa.string())
    if pa.types.is_nested(kind):
        texts = [None if value is None else dumps(value).decode() for value in readable_values(column)]
        return pa.array(texts, pa.string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        texts = [None if value is None else value.decode("utf-8", "backslashreplace") for value in column.to_pylist()]
        return pa.array(texts, pa.string())
    simple = (
        pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_temporal(kind)
    )
    return column if simple else column.cast(pa.string())


def _unique(names: list[str]) -> list[str]:
    """Distinct names: a column `a.b` of the input may stand beside the field `b` of `a`."""
    found: list[str] = []
    for name in names:
        while name in found:
            name += "_"
        found.append(name)
    return found
