"""Detects the kind of an input file by its content and name, and divides it into file splits."""

from __future__ import annotations

import itertools
import re

import pyarrow as pa
import pyarrow.parquet as pq

from engines.errors import ConfigError, ErrorCode
from engines.text import one_line
from pipeline.dataset.arrow_rows import is_arrow, open_arrow
from pipeline.dataset.csv_rows import header_problem
from pipeline.dataset.file_split import FileSplit
from pipeline.dataset.json_rows import spans_lines
from pipeline.dataset.text_stream import BOM, GZIP, READ_ERRORS, REMOTE_BLOCK, ZSTD, as_text, is_wide, open_text, read_head
from pipeline.storage.filesystem import resolve
from pipeline.storage.retry import patiently, store_failed

# Bytes of the beginning of a text that decide its kind, and of a JSON value that spans lines.
HEAD, LONG_HEAD = 16 << 10, 32 << 20

_CSV_NAME = re.compile(r"\.(csv|tsv)(\.gz|\.zst|\.zstd)?$", re.IGNORECASE)
_COMPRESSED_NAME = re.compile(r"\.(gz|zst|zstd)$", re.IGNORECASE)
# No text has these bytes: the control characters but tab, line feed, form feed, carriage return and escape.
_NOT_TEXT = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")
# The first bytes of files that cannot be read, and what the user may do.
_OTHERS = {
    b"PK\x03\x04": "an Excel or zip file: save it as CSV, or unpack it",
    b"\xd0\xcf\x11\xe0": "an Excel file: save it as CSV",
    b"%PDF": "a PDF file",
    b"SQLite format 3": "a SQLite database: export its table as CSV",
    b"Obj\x01": "an Avro file: convert it to Parquet",
    b"ORC": "an ORC file: convert it to Parquet",
    b"BZh": "a bzip2 file: unpack it, or compress it with gzip or zstd",
    b"\xfd7zXZ": "an xz file: unpack it, or compress it with gzip or zstd",
}


def file_splits_of(uri: str, name: str, chunk_bytes: int) -> list[FileSplit]:
    """The file splits of one file. A single one of kind "bad" if the file cannot be read. Raises `ConfigError` if the store
    failed."""
    try:
        return patiently(lambda: _detect(uri, name, chunk_bytes))
    except Exception as error:  # each store raises its own types, for example without a network
        text = f"dataset.path: cannot read {uri}: {one_line(error)}"
        raise ConfigError(text, code=ErrorCode.INPUT_FILES) from None


def _detect(uri: str, name: str, chunk_bytes: int) -> list[FileSplit]:
    lower, head = name.lower(), b""
    try:
        fs, path = resolve(uri)
        with fs.open_input_file(path) as file:
            head = file.read(HEAD)
            file.seek(0)
            if _is_parquet(head, lower):
                return _row_groups(uri, name, pq.ParquetFile(file), chunk_bytes)
            if _is_arrow(head, lower):
                reason = _repeated(open_arrow(file).schema, "an Arrow")
                return [_bad(uri, name, reason) if reason else FileSplit(uri, name, "arrow", 0, -1, 0)]
            return _text_splits(uri, name, chunk_bytes, file, head)
    except READ_ERRORS as error:
        if store_failed(error):
            raise
        wrong = isinstance(error, pa.ArrowInvalid)
        kind = "a Parquet file" if wrong and _is_parquet(head, lower) else "readable"
        kind = "an Arrow file" if wrong and _is_arrow(head, lower) else kind
        return [_bad(uri, name, f"not {kind}: {one_line(error)}")]


def _is_parquet(head: bytes, name: str) -> bool:
    return head.startswith(b"PAR1") or name.endswith((".parquet", ".pq"))


def _is_arrow(head: bytes, name: str) -> bool:
    return is_arrow(head) or name.endswith((".arrow", ".feather"))


def _bad(uri: str, name: str, reason: str) -> FileSplit:
    return FileSplit(uri, name, "bad", 0, 0, 0, reason)


def _text_splits(uri: str, name: str, chunk_bytes: int, file: pa.NativeFile, head: bytes) -> list[FileSplit]:
    """The file splits of a text file that begins with `head`."""
    compressed = GZIP.match(head) or ZSTD.match(head)
    if not compressed and (form := _COMPRESSED_NAME.search(name)):
        form_name = "gzip" if form[1].lower() == "gz" else "zstd"
        return [_bad(uri, name, f"not a {form_name} file: it begins with {head[:4]!r}")]
    plain = not compressed and not is_wide(head)
    text = head.removeprefix(BOM) if plain else read_head(as_text(pa.BufferedInputStream(file, HEAD), head), HEAD)
    whole = len(head if plain else text) < HEAD
    if reason := _no_text(text):
        return [_bad(uri, name, reason)]
    if _CSV_NAME.search(name):
        reason = header_problem(text, name, whole)
        return [_bad(uri, name, reason) if reason else FileSplit(uri, name, "csv", 0, -1, 0)]
    spans = spans_lines(text, whole)
    if spans is None:  # the first value is longer than the head
        with open_text(uri) as stream:
            spans = spans_lines(read_head(stream, LONG_HEAD), False) is not False
    if spans:
        return [FileSplit(uri, name, "json", 0, -1, 0)]
    if not plain:
        return [FileSplit(uri, name, "jsonl", 0, -1, 0)]
    starts = _line_starts(file, chunk_bytes)
    return [FileSplit(uri, name, "jsonl", at, stop, line) for (at, line), (stop, _) in itertools.pairwise(starts)]


def _no_text(head: bytes) -> str:
    """The reason why a file with this beginning is not a text file; otherwise empty."""
    if other := next((what for start, what in _OTHERS.items() if head.startswith(start)), None):
        return other
    return f"not text: it begins with {head[:16]!r}" if _NOT_TEXT.search(head[:16].partition(b"\n")[0]) else ""


def _line_starts(stream: pa.NativeFile, chunk_bytes: int) -> list[tuple[int, int]]:
    """(byte offset, line number) of a line start about every `chunk_bytes`, and of the end of the file."""
    size = stream.size()
    starts = [(0, 0)]
    lines = offset = 0
    while size > chunk_bytes and (block := stream.read(min(REMOTE_BLOCK, chunk_bytes))):
        start = offset + block.find(b"\n") + 1
        if start > offset and start - starts[-1][0] >= chunk_bytes and start < size:
            starts.append((start, lines + 1))
        lines += block.count(b"\n")
        offset += len(block)
    return [*starts, (size, lines)]


def _row_groups(uri: str, name: str, file: pq.ParquetFile, chunk_bytes: int) -> list[FileSplit]:
    if reason := _repeated(file.schema_arrow, "a Parquet"):
        return [_bad(uri, name, reason)]
    file_splits: list[FileSplit] = []
    first = row = rows = size = 0
    for group in range(file.metadata.num_row_groups):
        size += file.metadata.row_group(group).total_byte_size
        rows += file.metadata.row_group(group).num_rows
        if size >= chunk_bytes or group + 1 == file.metadata.num_row_groups:
            file_splits.append(FileSplit(uri, name, "parquet", first, group + 1, row))
            first, row, rows, size = group + 1, row + rows, 0, 0
    return file_splits or [FileSplit(uri, name, "parquet", 0, 0, 0)]


def _repeated(schema: pa.Schema, kind: str) -> str:
    """The reason why a file with two columns of one name cannot be read; otherwise empty."""
    name = next((name for name in schema.names if schema.names.count(name) > 1), None)
    return f"{kind} file with two columns named {name!r}" if name is not None else ""
