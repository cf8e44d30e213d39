"""Finds input files, divides them into file splits, and reads each as a stream. A bad row is a row with an error."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import posixpath
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import glob_translate
from pyarrow import fs as pafs

from engines.errors import ConfigError, nearest
from engines.text import one_line
from pipeline.dataset.formats import ArrowRow
from pipeline.dataset.tree import Entry, Tree, below, once, walk
from pipeline.storage.exact_json import has_long_number, loads
from pipeline.storage.filesystem import GLOB, resolve, split_options
from pipeline.storage.retry import steadily, store_failed

BATCH_ROWS = 2000
# A batch ends early at this many bytes of input, to bound the memory that long rows take.
BATCH_BYTES = 16 << 20
# Bytes of one read. Small, because a read that finds damage in a compressed file loses its data.
BLOCK = 256 << 10
REMOTE_BLOCK = 4 << 20
# Up to this many bytes of a line that cannot be parsed are kept for the error row.
RAW_BYTES = 64 << 10
OPEN_AT_ONCE = 16

_DATA_NAME = re.compile(r"\.(jsonl|ndjson|json)(\.gz|\.zst|\.zstd)?$|\.(parquet|pq)$", re.IGNORECASE)
_HIDDEN = re.compile(r"(^|/)[._]")
_GZIP, _ZSTD = re.compile(rb"\x1f\x8b"), re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class FileSplit:
    """A unit of reading: a whole file, lines of a plain JSONL file, or row groups of a Parquet file."""

    file: str  # a path or URI for `resolve`
    name: str  # relative to the dataset's root; part of a row's place, and unchanged when the dataset moves
    kind: str  # "jsonl", "parquet", or "bad": a file that cannot be read
    start: int  # byte offset or row group, inclusive
    stop: int  # byte offset or row group, exclusive; -1: the end of a compressed file
    first_row: int  # number in the file, from 0: of the physical line (blank lines count) or of the row
    reason: str = ""  # for a bad file: a description that completes "the file is …"


@dataclass(slots=True)
class RawRow:
    """One row: its columns, or the reason why it cannot be read."""

    row: int
    columns: dict[str, Any] | None
    error: str | None = None
    raw: bytes | None = None  # with an error: the beginning of the line


# --- finding ---------------------------------------------------------------------------------------------------------


def list_file_splits(
    path: str | os.PathLike[str] | Sequence[str], *, chunk_bytes: int = 64 << 20, on_bad_input: str = "quarantine"
) -> list[FileSplit]:
    """All file splits of a file, a directory, a glob or a list of them. The order is that of the list, then by path.

    A directory is searched recursively for .jsonl, .ndjson, .json, .parquet and .pq (also .gz, .zst). Names that begin with
    "." or "_" are skipped. Named files and files that match a glob may have any name: their content decides. A file that
    is named twice, or that is also reached through symbolic links, is read once. Outputs of Eagleray below a directory or
    glob are skipped; to read one, name its data directory. Large plain JSONL files are read here to count their lines; for
    a remote file this takes as long as its download.

    Raises `ConfigError` if nothing is found, if no file can be read, or with `on_bad_input="fail"` if any file cannot be
    read. Otherwise an unreadable file becomes a file split of kind "bad".
    """
    paths = [os.fspath(path)] if isinstance(path, (str, os.PathLike)) else [os.fspath(p) for p in path]
    if not paths or not all(paths):
        raise ConfigError("dataset.path is empty")
    files: dict[str, str] = {}
    real: dict[str, str] = {}
    for one in paths:
        for uri, entry in _find(one).items():
            if real.setdefault(entry.real, uri) == uri:
                files[uri] = entry.name
    if len(set(files.values())) < len(files):  # two entries of the list contain files of the same name
        common = os.path.commonprefix(list(files)).rpartition("/")[0]  # noqa: RUF071 -- URIs and paths may be mixed
        files = {uri: uri[len(common) :].lstrip("/") for uri in files}
    with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
        found = list(pool.map(lambda uri: _file_splits_of(uri, files[uri], chunk_bytes), files))
    file_splits = list(itertools.chain.from_iterable(found))
    bad = [file_split for file_split in file_splits if file_split.kind == "bad"]
    if bad and (on_bad_input == "fail" or len(bad) == len(files)):
        more = f" (and {len(bad) - 1} more that cannot be read)" if len(bad) > 1 else ""
        raise ConfigError(f"{bad[0].file} is {bad[0].reason}{more}")
    return file_splits


def _find(path: str) -> dict[str, Entry]:
    """Maps the URI of each file of one entry to an `Entry` with its name relative to the directory or glob. Raises
    `ConfigError` if there is no file."""
    fs, inner = resolve(path)
    local = isinstance(fs, pafs.LocalFileSystem)
    base, options = (inner, "") if local else split_options(path)
    try:
        kind = fs.get_file_info(inner).type
        if kind == pafs.FileType.File:  # its name may contain glob characters
            real = os.path.realpath(inner) if local else f"{fs.type_name}:{inner}"
            return {base + options: Entry(posixpath.basename(base), True, real)}
        if kind == pafs.FileType.Directory:
            root, name = inner, ""
            tree, wrong = _below(fs, inner), "there is no .jsonl or .parquet file in"
        elif glob := GLOB.search(base):
            base = base[: base.rfind("/", 0, glob.start()) + 1]
            root = resolve(base + options)[1]
            name = _relative(inner, root)
            tree, wrong = _matching(fs, root, inner), "nothing matches"
        else:
            root, _, name = inner.rpartition("/")
            tree, wrong = Tree(), "there is no file or directory"
        if not tree.entries:
            if tree.outputs:
                output = f"{root}/{tree.outputs[0]}".rstrip("/")
                wrong = f"{output} is an output of Eagleray's, which is read only where {output}/data is named: {wrong}"
            there = fs.get_file_info(pafs.FileSelector(root or "/", allow_not_found=True))
            raise ConfigError(f"{wrong} '{path}'{nearest(name, [info.base_name for info in there]) if there else ''}")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"cannot read '{path}': {one_line(error)}") from None
    return {f"{base.removesuffix('/')}/{entry.name}{options}": entry for entry in once(tree.entries)}


def _relative(path: str, root: str) -> str:
    return path.removeprefix(root).lstrip("/")


def _below(fs: pafs.FileSystem, directory: str) -> Tree:
    """The data files in a directory."""
    tree = walk(fs, directory)
    tree.entries = [e for e in tree.entries if e.is_file and _DATA_NAME.search(e.name) and not _HIDDEN.search(e.name)]
    return tree


def _matching(fs: pafs.FileSystem, root: str, pattern: str) -> Tree:
    """The files that a glob matches. `root` is the directory above its first special character."""
    regex = re.compile(glob_translate(pattern))
    parts = _relative(pattern, root).split("/")
    below_hidden, deep = _HIDDEN.search("/".join(parts)), any("**" in part for part in parts)

    def wanted(name: str) -> bool:
        """True if the pattern names this directory, as `runs/*/data` names the data directories of outputs. `**` names
        none."""
        depth = name.count("/")
        return not deep and depth < len(parts) and name.endswith(f"/{parts[depth]}")

    there = fs.get_file_info(root or "/").type != pafs.FileType.NotFound
    levels = None if deep else len(parts)
    tree = walk(fs, root, levels=levels, hidden=True, wanted=wanted) if there else Tree()
    found = Tree(outputs=tree.outputs)
    for entry in tree.entries:
        # A pattern such as "_parts/*" asks for hidden names, which are skipped otherwise.
        if not regex.match(f"{root}/{entry.name}") or (_HIDDEN.search(entry.name) and not below_hidden):
            continue
        if entry.is_file:
            found.entries.append(entry)
        elif not deep:  # "2024-*" may match directories; the files in them are read. "**" already matches the files.
            inside = _below(fs, f"{root}/{entry.name}")
            found.entries += below(entry, inside.entries)
    return found


# --- cutting ---------------------------------------------------------------------------------------------------------


def _file_splits_of(uri: str, name: str, chunk_bytes: int) -> list[FileSplit]:
    """The file splits of one file. A single one of kind "bad" if the file cannot be read. Raises `ConfigError` if the store
    failed."""
    lower = name.lower()
    reason = ""
    try:
        fs, path = resolve(uri)
        with fs.open_input_file(path) as stream:
            head = stream.read(4)
            stream.seek(0)
            if head == b"PAR1" or lower.endswith((".parquet", ".pq")):
                return _row_groups(uri, name, pq.ParquetFile(stream), chunk_bytes)
            if _GZIP.match(head) or _ZSTD.match(head):
                return [FileSplit(uri, name, "jsonl", 0, -1, 0)]
            if lower.endswith((".gz", ".zst", ".zstd")):
                reason = f"not a {'gzip' if lower.endswith('.gz') else 'zstd'} file: it begins with {head!r}"
            elif lower.endswith(".json") and head[:1] == b"[":
                reason = "one JSON array over many lines, not JSON lines: convert it with jq -c '.[]'"
            else:
                starts = _line_starts(stream, chunk_bytes)
                return [
                    FileSplit(uri, name, "jsonl", at, stop, line) for (at, line), (stop, _) in itertools.pairwise(starts)
                ]
    except (OSError, ValueError, pa.ArrowException) as error:
        if store_failed(error):
            raise ConfigError(f"cannot read {uri}: {one_line(error)}") from None
        reason = f"not {'a Parquet file' if isinstance(error, pa.ArrowInvalid) else 'readable'}: {one_line(error)}"
    return [FileSplit(uri, name, "bad", 0, 0, 0, reason)]


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
    names = file.schema_arrow.names
    if len(set(names)) < len(names):
        return [FileSplit(uri, name, "bad", 0, 0, 0, "a Parquet file with two columns of one name")]
    file_splits: list[FileSplit] = []
    first = row = rows = size = 0
    for group in range(file.metadata.num_row_groups):
        size += file.metadata.row_group(group).total_byte_size
        rows += file.metadata.row_group(group).num_rows
        if size >= chunk_bytes or group + 1 == file.metadata.num_row_groups:
            file_splits.append(FileSplit(uri, name, "parquet", first, group + 1, row))
            first, row, rows, size = group + 1, row + rows, 0, 0
    return file_splits or [FileSplit(uri, name, "parquet", 0, 0, 0)]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_file_split(
    file_split: FileSplit, *, max_row_bytes: int = 32 << 20, batch_rows: int = BATCH_ROWS
) -> Iterator[list[RawRow]]:
    """The rows of a file split, in order and in batches. Memory is bounded by one batch and one line of `max_row_bytes`.

    Blank lines are counted and skipped. Unreadable content becomes a row with an error; only a store that stays
    unavailable raises (`store_failed`). The batches of a Parquet file split match those of `read_table` row for row.
    """
    return steadily(lambda: _read_file_split(file_split, max_row_bytes, batch_rows))


def _read_file_split(file_split: FileSplit, max_row_bytes: int, batch_rows: int) -> Iterator[list[RawRow]]:
    if file_split.kind == "bad":
        yield [RawRow(file_split.first_row, None, f"the file is {file_split.reason}")]
    elif file_split.kind == "parquet":
        for first_row, batch, error in _parquet_batches(file_split, batch_rows):
            yield [RawRow(first_row, None, error)] if error else _rows_of(first_row, batch)
    else:
        yield from _read_lines(file_split, max_row_bytes, batch_rows)


def _read_lines(file_split: FileSplit, limit: int, batch_rows: int) -> Iterator[list[RawRow]]:
    number = file_split.first_row
    batch: list[RawRow] = []
    size = 0
    try:
        for lines, passed, long_number in _lines(file_split, limit):
            for line in lines:
                if number == 0:
                    line = line.removeprefix(_BOM)
                if len(line) > limit:
                    length = len(line) + (passed if line is lines[-1] else 0)
                    reason = f"the line has {length:,} bytes, the limit is {limit:,}"
                    batch.append(RawRow(number, None, reason, line[:RAW_BYTES]))
                    size += RAW_BYTES
                elif line and not line.isspace():
                    batch.append(_parse_line(number, line, long_number))
                    size += len(line)
                number += 1
                if len(batch) == batch_rows or size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        if store_failed(error):
            raise
        reason = f"the file cannot be read: {one_line(error)}: rows from this line on are missing"
        batch.append(RawRow(number, None, reason))
    if batch:
        yield batch


def _lines(file_split: FileSplit, limit: int) -> Iterator[tuple[list[bytes], int, bool]]:
    """For each block: the lines that end in it, how many bytes of the last line were skipped, and True if a line may have a
    long number.

    The end of a line over `limit` bytes is skipped, not kept in memory. Raises if the file ends too early or is damaged.
    """
    at, rest, block = file_split.start, b"", b"begin"
    stop = file_split.stop if file_split.stop >= 0 else sys.maxsize
    fs, path = resolve(file_split.file)
    with fs.open_input_file(path) as file:
        stream = _text_of(file, file_split)
        while block:
            block = stream.read1(min(BLOCK, stop - at))
            if not block and at < file_split.stop:
                raise EOFError(f"it ends at byte {at:,} of {file_split.stop:,}")
            at += len(block)
            text = rest + (block or b"\n")
            *lines, rest = text.split(b"\n")
            passed = 0
            if len(rest) > max(limit, RAW_BYTES):
                lines.append(rest)
                while rest and not rest.endswith(b"\n"):
                    rest = stream.readline(BLOCK)
                    at += len(rest)
                    passed += len(rest.rstrip(b"\n"))
                rest = b""
            yield lines, passed, has_long_number(text)


def _text_of(file: pa.NativeFile, file_split: FileSplit) -> Any:
    """A stream of the file split's text, decompressed if necessary. It does not end at `stop`."""
    head = file.read(4) if file_split.stop < 0 else b""
    file.seek(file_split.start)
    stream = pa.BufferedInputStream(file, REMOTE_BLOCK)
    if _GZIP.match(head):
        return gzip.GzipFile(fileobj=stream)
    if _ZSTD.match(head):  # not the package `zstandard`, which accepts a truncated file
        stream = pa.CompressedInputStream(stream, "zstd")
    return io.BufferedReader(stream, BLOCK)


def _parse_line(number: int, text: bytes, long_number: bool) -> RawRow:
    try:
        value = loads(text, long_number)
    except ValueError as error:
        return RawRow(number, None, str(error), text[:RAW_BYTES])
    if type(value) is not dict:
        kind = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
        return RawRow(number, None, f"not an object but {kind}", text[:RAW_BYTES])
    return RawRow(number, value)


# --- Parquet ---------------------------------------------------------------------------------------------------------


def parquet_schema(file_split: FileSplit) -> pa.Schema:
    """The schema of a Parquet file split's batches. Raises the error of pyarrow if the file is missing."""
    fs, path = resolve(file_split.file)
    with fs.open_input_file(path) as stream:
        return pq.ParquetFile(stream).schema_arrow.remove_metadata()


def read_table(file_split: FileSplit, batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """The batches of a Parquet file split as Arrow record batches, one for each batch of `read_file_split`.

    Unreadable rows are one row of nulls here, and one row with an error in `read_file_split`.
    """
    return (batch for _, batch, _ in steadily(lambda: _parquet_batches(file_split, batch_rows)))


def _parquet_batches(file_split: FileSplit, batch_rows: int) -> Iterator[tuple[int, pa.RecordBatch, str]]:
    """(row number, batch, ""), or (row number, one row of nulls, the reason why the rows from that number are missing)."""
    row = file_split.first_row
    schema = pa.schema([])
    try:
        fs, path = resolve(file_split.file)
        with fs.open_input_file(path) as stream:
            file = pq.ParquetFile(stream)
            schema = file.schema_arrow
            for group in range(file_split.start, file_split.stop):
                about = file.metadata.row_group(group)
                end = row + about.num_rows
                row_bytes = about.total_byte_size // max(1, about.num_rows)
                try:
                    for batch in file.iter_batches(max(1, min(batch_rows, BATCH_BYTES // max(1, row_bytes))), [group]):
                        yield row, batch, ""
                        row += batch.num_rows
                except (OSError, ValueError, pa.ArrowException) as error:
                    if store_failed(error):
                        raise
                    reason = f"the Parquet file is damaged ({one_line(error)}): its rows {row:,} to {end - 1:,} are missing"
                    yield row, _one_null_row(schema), reason
                row = end
    except (OSError, ValueError, pa.ArrowException) as error:
        if store_failed(error):
            raise
        reason = f"the Parquet file cannot be read ({one_line(error)}): rows from {row:,} on are missing"
        yield row, _one_null_row(schema), reason


def _one_null_row(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_struct_array(pa.nulls(1, pa.struct(schema)))


def _rows_of(first_row: int, batch: pa.RecordBatch) -> list[RawRow]:
    """Converts a batch to Python values. A row with a value that Python cannot represent (the year 10000, invalid UTF-8)
    has an error."""
    try:
        return [RawRow(number, ArrowRow(columns)) for number, columns in enumerate(batch.to_pylist(), first_row)]
    except Exception as error:  # pyarrow raises several types here
        if batch.num_rows == 1:
            return [RawRow(first_row, None, f"{type(error).__name__}: {one_line(error)}")]
        return [row for at in range(batch.num_rows) for row in _rows_of(first_row + at, batch.slice(at, 1))]
