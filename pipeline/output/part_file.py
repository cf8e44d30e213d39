"""Collects the content of one part file, piece by piece, in memory: the plan bounds the size of a part."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.storage.filesystem import write_atomic

# The rows that show if the values of a column repeat.
SAMPLE = 1000


class PartFile:
    """A Parquet file of row groups, or a file of JSON lines."""

    def __init__(self, path: str) -> None:
        self.path, self.rows = path, 0  # the path is below the output
        self._content = io.BytesIO()
        self._parquet: pq.ParquetWriter | None = None

    def add_table(self, table: pa.Table) -> None:
        """Adds a row group."""
        if self._parquet is None:
            names = _repeating(table)
            self._parquet = pq.ParquetWriter(self._content, table.schema, compression="zstd", use_dictionary=names)
        if len(table) or not self.rows:
            self._parquet.write_table(table, row_group_size=max(1, len(table)))
        self.rows += len(table)

    def add_lines(self, lines: bytes, rows: int) -> None:
        self._content.write(lines)
        self.rows += rows

    def write(self, fs: pafs.FileSystem, root: str) -> None:
        """Writes the file, complete or not at all."""
        if self._parquet is not None:
            self._parquet.close()
        write_atomic(fs, f"{root}/{self.path}", self._content.getbuffer())


def _repeating(table: pa.Table) -> list[str]:
    """The columns with values that repeat. For others, such as ids and conversations, a dictionary takes time and saves
    nothing."""
    head, is_a, names = table.slice(0, SAMPLE), pa.types, list[str]()
    for part in table.schema:
        kind = part.type
        if is_a.is_struct(kind):
            names += [f"{part.name}.{child.name}" for child in kind]
        elif is_a.is_string(kind) or is_a.is_integer(kind) or is_a.is_float64(kind):
            if 2 * pc.count_distinct(head[part.name]).as_py() <= len(head):
                names.append(part.name)
        elif not is_a.is_nested(kind):
            names.append(part.name)
    return names
