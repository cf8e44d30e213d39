"""From paths to rows: files are found, cut into chunks, and read as a stream. A bad row is a row with an error."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import os
import posixpath
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from engines.types import ConfigError
from pipeline.formats import ArrowRow
from pipeline.fs import one_line, resolve, split_scheme, uri_of
from pipeline.lossless import has_long_number, loads

BATCH_ROWS = 2000
# A batch ends early at this many bytes of input, so that long rows do not pile up.
BATCH_BYTES = 16 << 20
BLOCK = 2 << 20
# How much of a line that cannot be read is kept to look at.
RAW_BYTES = 64 << 10
# Compressed bytes given to zstd at once: it has no bound on its output, which is at most 128 KiB for every 4 bytes.
ZSTD_SLICE = 4 << 10
READ_ATTEMPTS = 3
OPEN_AT_ONCE = 16

_DATA_NAME = re.compile(r"\.(jsonl|ndjson|json)(\.gz|\.zst|\.zstd)?$|\.(parquet|pq)$", re.IGNORECASE)
_PARQUET_NAME = re.compile(r"\.(parquet|pq)$", re.IGNORECASE)
_GZIP, _ZSTD, _ZSTD_SKIP, _BOM = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18", b"\xef\xbb\xbf"
# Beginnings of files that are neither JSON lines nor Parquet, and what they are.
_OTHER_MAGIC = {
    b"PK\x03\x04": "a zip archive, not JSON lines or Parquet",
    b"BZh": "compressed with bzip2: gzip and zstd are read",
    b"\xfd7zXZ": "compressed with xz: gzip and zstd are read",
    b"ARROW1": "an Arrow file, not JSON lines or Parquet",
    b"PARE": "an encrypted Parquet file",
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8",
}
_OTHER_NAMES = (".csv", ".tsv", ".xlsx", ".xls")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A unit of reading: a whole file, lines of a plain JSONL file, or row groups of a Parquet file."""

    file: str  # what `resolve` takes
    name: str  # relative to the dataset's root: part of a row's place, the same when the dataset moves
    kind: str  # "jsonl", "parquet", or "bad": a file that cannot be read
    start: int  # byte offset, or first row group
    stop: int  # end of it; -1: to the end of a compressed file
    first_row: int  # of the file: physical line number (blank lines count) or row number, from 0
    reason: str = ""  # of a bad file: what it is instead


@dataclass(slots=True)
class Row:
    """One row: its columns, or why there are none."""

    row: int
    columns: dict[str, Any] | None
    error: str | None = None
    raw: bytes | None = None  # with an error: how the line begins


# --- finding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    uri: str
    name: str
    fs: pafs.FileSystem
    path: str
    size: int


def list_chunks(
    path: str | os.PathLike[str] | Sequence[str], *, chunk_bytes: int = 64 << 20, on_bad_input: str = "quarantine"
) -> list[Chunk]:
    """All chunks of a file, directory, glob, or list of them, in a fixed order: as listed, then sorted by path.

    A directory is searched recursively for .jsonl, .ndjson, .json, .parquet and .pq (.gz, .zst); what begins with "."
    or "_" is passed over. Files that are named, or matched by a glob, need no such name: their content tells. A file
    that is named twice is read once. Large plain JSONL files are read through here, to count their lines, which for
    remote ones takes as long as their download.

    Raises `ConfigError` where nothing is found, where no file can be read, and with `on_bad_input="fail"` where one
    cannot; otherwise that file is a chunk of kind "bad".
    """
    if on_bad_input not in ("quarantine", "fail"):
        raise ConfigError(f"dataset.on_bad_input must be quarantine or fail, not {on_bad_input!r}")
    paths = [os.fspath(path)] if isinstance(path, (str, os.PathLike)) else [os.fspath(p) for p in path]
    if not paths or not all(paths):
        raise ConfigError("dataset.path is empty")
    files = {file.uri: file for one in paths for file in _find(one)}
    named = _unique_names(list(files.values()))
    with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
        found = list(pool.map(lambda file: _chunks_of(file, chunk_bytes), named))
    chunks = list(itertools.chain.from_iterable(found))
    bad = [chunk for chunk in chunks if chunk.kind == "bad"]
    if bad and (on_bad_input == "fail" or len(bad) == len(named)):
        more = f" (and {len(bad) - 1} more that cannot be read)" if len(bad) > 1 else ""
        raise ConfigError(f"{bad[0].file} is {bad[0].reason}{more}")
    return chunks


def _find(path: str) -> list[_File]:
    """The files of one entry, sorted. Raises `ConfigError` where there are none."""
    fs, inner = resolve(path)
    try:
        info = fs.get_file_info(inner)
        if info.type == pafs.FileType.File:  # also one whose name has a glob's characters in it
            return [_file(path, fs, info, posixpath.basename(inner))]
        if info.type == pafs.FileType.Directory:
            found = _in_directory(path, fs, inner, inner)
            if not found:
                raise ConfigError(f"there is no .jsonl or .parquet file in '{path}'{_holds(fs, inner)}")
        elif _has_glob(inner):
            found = _matching(path, fs, inner)
            if not found:
                raise ConfigError(f"nothing matches '{path}'{_near(fs, inner)}")
        else:
            raise ConfigError(f"there is no file or directory '{path}'{_near(fs, inner)}")
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"cannot read '{path}': {one_line(error)}") from None
    return sorted(found, key=lambda file: file.path)


def _file(origin: str, fs: pafs.FileSystem, info: pafs.FileInfo, name: str) -> _File:
    if split_scheme(origin)[0] in ("http", "https"):
        name = name.partition("?")[0]  # a signature has no place in a row's
    return _File(uri_of(origin, info.path), name, fs, info.path, info.size if info.size is not None else -1)


def _hidden(relative: str) -> bool:
    return any(part[:1] in (".", "_") for part in relative.split("/"))


def _relative(path: str, root: str) -> str:
    return path[len(root) :].lstrip("/") if path.startswith(root) else path.lstrip("/")


def _in_directory(origin: str, fs: pafs.FileSystem, directory: str, root: str) -> list[_File]:
    infos = fs.get_file_info(pafs.FileSelector(directory, recursive=True))
    return [
        _file(origin, fs, info, _relative(info.path, root))
        for info in infos
        if info.type == pafs.FileType.File and _DATA_NAME.search(info.path) and not _hidden(_relative(info.path, directory))
    ]


def _has_glob(path: str) -> bool:
    return re.search(r"[*?\[]", path) is not None


def _glob_root(pattern: str) -> str:
    """The deepest directory above a pattern's first special character."""
    return pattern[: re.search(r"[*?\[]", pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]


def _matching(origin: str, fs: pafs.FileSystem, pattern: str) -> list[_File]:
    root = _glob_root(pattern)
    rest = _relative(pattern, root)
    regex = _glob_regex(rest)
    # An explicit "_parts/*" asks for what is otherwise passed over.
    hidden = any(part[:1] in (".", "_") for part in rest.split("/"))
    selector = pafs.FileSelector(root or "/", recursive="/" in rest or "**" in rest, allow_not_found=True)
    found = []
    for info in fs.get_file_info(selector):
        relative = _relative(info.path, root)
        if not regex.fullmatch(relative) or (_hidden(relative) and not hidden):
            continue
        if info.type == pafs.FileType.File:
            found.append(_file(origin, fs, info, relative))
        elif "**" not in rest:  # "2024-*" may name directories; "**" has their files already
            found.extend(_in_directory(origin, fs, info.path, root))
    return found


def _glob_regex(pattern: str) -> re.Pattern[str]:
    """`*` and `?` stay within a name, `**` crosses directories (none, too), `[a-c]` is one character."""
    out = []
    for token in re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", pattern):
        if token == "**/":
            out.append("(?:.*/)?")
        elif token == "**":
            out.append(".*")
        elif token == "*":
            out.append("[^/]*")
        elif token == "?":
            out.append("[^/]")
        elif token.startswith("[") and token.endswith("]"):
            out.append(fnmatch.translate(token).removeprefix("(?s:").partition(")")[0])
        else:
            out.append(re.escape(token))
    return re.compile("".join(out), re.DOTALL)


def _siblings(fs: pafs.FileSystem, directory: str) -> list[str]:
    try:
        return sorted(i.base_name for i in fs.get_file_info(pafs.FileSelector(directory or "/", allow_not_found=True)))
    except (OSError, pa.ArrowException):
        return []


def _near(fs: pafs.FileSystem, inner: str) -> str:
    """A hint at what is there instead: a similar name, or the nearest parent that exists."""
    parent, _, name = (_glob_root(inner) + "/" if _has_glob(inner) else inner).rpartition("/")
    names = _siblings(fs, parent)
    if names and name:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        return f" (did you mean '{close[0]}'?)" if close else _holds(fs, parent)
    return _holds(fs, parent)


def _holds(fs: pafs.FileSystem, directory: str, most: int = 5) -> str:
    names = _siblings(fs, directory)
    return f" (it holds {', '.join(names[:most])}{', …' if len(names) > most else ''})" if names else ""


def _unique_names(files: list[_File]) -> list[_File]:
    """Names extended by parent directories where two files, from two entries of a list, share one."""
    longer = {file.uri: 0 for file in files}  # by how many directories

    def name(file: _File) -> str:
        parts = file.path.strip("/").split("/")
        wanted = file.name.count("/") + 1 + longer[file.uri]
        if not longer[file.uri]:
            return file.name
        return "/".join(parts[-wanted:]) if wanted <= len(parts) else file.uri

    while True:
        counts = Counter(map(name, files))
        shared = [file for file in files if counts[name(file)] > 1]
        if not shared:
            return [replace(file, name=name(file)) for file in files]
        for file in shared:
            longer[file.uri] += 1


# --- cutting ---------------------------------------------------------------------------------------------------------


def _chunks_of(file: _File, chunk_bytes: int) -> list[Chunk]:
    """The chunks of one file; a single one of kind "bad" where it cannot be read."""

    def bad(reason: str) -> list[Chunk]:
        return [Chunk(file.uri, file.name, "bad", 0, 0, 0, reason)]

    try:
        with file.fs.open_input_file(file.path) as stream:
            head = stream.read(RAW_BYTES)
            size = stream.size() if file.size < 0 else file.size
            lower = file.path.lower()
            if head[:4] == b"PAR1" or _PARQUET_NAME.search(lower):
                return _row_groups(file, stream, head, chunk_bytes)
            if _is_compressed(head):
                return [Chunk(file.uri, file.name, "jsonl", 0, -1, 0)]
            if lower.endswith((".gz", ".zst", ".zstd")):
                what = "gzip" if lower.endswith(".gz") else "zstd"
                return bad(f"not a {what} file: it {'is empty' if not head else f'begins with {head[:4]!r}'}")
            if reason := _refused(lower, head):
                return bad(reason)
            starts = [(0, 0)]
            if size > chunk_bytes:
                stream.seek(0)
                starts = _line_starts(stream, size, max(1, chunk_bytes))
    except pa.ArrowInvalid as error:
        return bad(f"not a Parquet file: {one_line(error)}")
    except (OSError, pa.ArrowException) as error:
        return bad(f"not readable: {one_line(error)}")
    stops = [start for start, _ in starts[1:]] + [size]
    return [
        Chunk(file.uri, file.name, "jsonl", start, stop, line) for (start, line), stop in zip(starts, stops, strict=True)
    ]


def _is_compressed(head: bytes) -> bool:
    return head[:2] == _GZIP or head[:4] == _ZSTD or (head[1:4] == _ZSTD_SKIP and head[0] & 0xF0 == 0x50)


def _refused(lower: str, head: bytes) -> str | None:
    """What a file is that is surely not JSON lines."""
    for magic, reason in _OTHER_MAGIC.items():
        if head.startswith(magic):
            return reason
    if lower.endswith(_OTHER_NAMES):
        return "neither JSON lines nor Parquet, by its name: convert it to one of them"
    line = head.removeprefix(_BOM).lstrip().partition(b"\n")[0].rstrip()
    if line[:1] == b"[" and len(line) < RAW_BYTES // 2:
        try:
            loads(line)
        except ValueError:
            return "one JSON array over many lines, not JSON lines: convert it with jq -c '.[]'"
    return None


def _line_starts(stream: pa.NativeFile, size: int, chunk_bytes: int) -> list[tuple[int, int]]:
    """(byte offset, line number) of a line start about every `chunk_bytes`."""
    starts = [(0, 0)]
    lines = offset = 0
    target = chunk_bytes
    while offset < size and (block := stream.read(min(4 * BLOCK, size - offset))):
        counted = 0
        while (at := block.find(b"\n", max(target - 1 - offset, counted))) >= 0:
            lines += block.count(b"\n", counted, at + 1)
            counted = at + 1
            start = offset + counted
            target = start + chunk_bytes
            if start < size:
                starts.append((start, lines))
        lines += block.count(b"\n", counted)
        offset += len(block)
    return starts


def _row_groups(file: _File, stream: pa.NativeFile, head: bytes, chunk_bytes: int) -> list[Chunk]:
    if head[:4] != b"PAR1":
        begins = "it is empty" if not head else f"it begins with {head[:4]!r}"
        return [Chunk(file.uri, file.name, "bad", 0, 0, 0, f"not a Parquet file: {begins}")]
    metadata = pq.ParquetFile(stream).metadata
    chunks: list[Chunk] = []
    first = row = rows = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        rows += metadata.row_group(group).num_rows
        if size >= chunk_bytes or group + 1 == metadata.num_row_groups:
            chunks.append(Chunk(file.uri, file.name, "parquet", first, group + 1, row))
            first, row, rows, size = group + 1, row + rows, 0, 0
    return chunks or [Chunk(file.uri, file.name, "parquet", 0, 0, 0)]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_chunk(chunk: Chunk, *, max_row_bytes: int = 32 << 20, batch_rows: int = BATCH_ROWS) -> Iterator[list[Row]]:
    """The rows of a chunk in order, in batches; memory is bounded by a batch and one line of `max_row_bytes`.

    Blank lines are counted and skipped. What cannot be read is a row with an error: nothing in a file raises. The
    batches of a Parquet chunk are those of `read_table`, row for row.
    """
    if chunk.kind == "bad":
        yield [Row(chunk.first_row, None, f"the file is {chunk.reason}")]
    elif chunk.kind == "parquet":
        for first_row, batch, error in _parquet_batches(chunk, batch_rows):
            yield [Row(first_row, None, error)] if error else _rows_of(first_row, batch)
    else:
        yield from _read_lines(chunk, max_row_bytes, batch_rows)


@dataclass(slots=True)
class _TooLong:
    """A line over the limit, of which only the beginning is kept."""

    head: bytes
    size: int


class _Broken(Exception):
    """The file ends here, though not where it should."""


def _read_lines(chunk: Chunk, limit: int, batch_rows: int) -> Iterator[list[Row]]:
    number = chunk.first_row
    first = chunk.start == 0
    batch: list[Row] = []
    size = 0
    reader = _Lines(chunk, limit)
    for lines in reader:
        long_numbers = reader.long_numbers
        for line in lines:
            row = _parse_line(number, line, long_numbers, limit, first)
            first = False
            number += 1
            if row is None:
                continue
            batch.append(row)
            size += len(line) if type(line) is bytes else RAW_BYTES
            if len(batch) == batch_rows or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if reader.broken:
        batch.append(Row(number, None, f"{reader.broken}: rows from this line on are missing", reader.rest[:RAW_BYTES]))
    if batch:
        yield batch


def _parse_line(number: int, line: bytes | _TooLong, long_numbers: bool, limit: int, first: bool) -> Row | None:
    """A row; None for a blank line."""
    if type(line) is not bytes:
        assert isinstance(line, _TooLong)
        return Row(number, None, f"the line has {line.size:,} bytes, the limit is {limit:,}", line.head)
    if first:
        line = line.removeprefix(_BOM)
    if not line or line.isspace():
        return None
    try:
        value = loads(line, long_numbers)
    except ValueError as error:
        return Row(number, None, str(error), line[:RAW_BYTES])
    if type(value) is not dict:
        kind = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
        return Row(number, None, f"not an object but {kind}", line[:RAW_BYTES])
    return Row(number, value)


class _Lines:
    """The lines of a chunk, a list for each block read. Iterate once.

    `long_numbers` tells of the last list whether a line in it may have an integer beyond 64 bits. After the last one,
    `broken` says why the file ends too early, if it does, and `rest` is what there was of the line cut off.
    """

    def __init__(self, chunk: Chunk, limit: int) -> None:
        self.chunk, self.limit = chunk, limit
        self.long_numbers = False
        self.broken = ""
        self.rest = b""

    def __iter__(self) -> Iterator[list[bytes | _TooLong]]:
        pending: list[bytes] = []  # pieces of the line that the blocks so far leave open
        size = 0
        blocks = _text_blocks(self.chunk)
        while True:
            try:
                block = next(blocks, b"")
            except _Broken as error:
                self.broken, self.rest = str(error), b"".join(pending)
                return
            if not block:
                break
            lines: list[bytes | _TooLong] = [*block.split(b"\n")]
            if len(lines) == 1:
                pending, size = self._open(pending, size, block)
                continue
            lines[0] = first = self._close(pending, size, lines[0])
            # Once for the block is cheaper than for every line; only the first line reaches beyond the block.
            self.long_numbers = has_long_number(block) or (type(first) is bytes and has_long_number(first))
            tail = lines.pop()
            assert isinstance(tail, bytes)
            pending, size = self._open([], 0, tail)
            if self.limit < len(block):
                lines = [self._checked(line) for line in lines]
            yield lines
        if size:
            self.long_numbers = True
            yield [self._close(pending, size, b"")]

    def _open(self, pending: list[bytes], size: int, piece: bytes) -> tuple[list[bytes], int]:
        """One more piece of an open line; beyond the limit only its beginning is kept."""
        size += len(piece)
        if size <= self.limit:
            if piece:
                pending.append(piece)
        elif size - len(piece) <= self.limit:
            pending = [b"".join([*pending, piece])[:RAW_BYTES]]
        elif (kept := sum(map(len, pending))) < RAW_BYTES:
            pending.append(piece[: RAW_BYTES - kept])
        return pending, size

    def _close(self, pending: list[bytes], size: int, piece: Any) -> bytes | _TooLong:
        if not pending:
            return self._checked(piece)
        size += len(piece)
        if size > self.limit:
            head = b"".join([*pending, piece])[:RAW_BYTES]
            return _TooLong(head, size)
        return b"".join([*pending, piece])

    def _checked(self, line: bytes | _TooLong) -> bytes | _TooLong:
        if isinstance(line, bytes) and len(line) > self.limit:
            return _TooLong(line[:RAW_BYTES], len(line))
        return line


def _text_blocks(chunk: Chunk) -> Iterator[bytes]:
    """The chunk's text in blocks, decompressed where need be. Raises `_Broken` where the file breaks off."""
    blocks = _raw_blocks(chunk)
    if chunk.stop >= 0:
        yield from blocks
        return
    head = next(blocks, b"")
    blocks = itertools.chain([head], blocks)
    if head[:2] == _GZIP:
        yield from _gunzip(blocks)
    elif _is_compressed(head):
        yield from _gathered(_unzstd(blocks))
    else:
        yield from blocks


def _raw_blocks(chunk: Chunk) -> Iterator[bytes]:
    """Bytes of the file. A read that fails is tried again where it stopped; then `_Broken`."""
    at, failures = chunk.start, 0
    while True:
        try:
            fs, path = resolve(chunk.file)
            with fs.open_input_file(path) as stream:
                stop = chunk.stop if chunk.stop >= 0 else stream.size()
                if at:
                    stream.seek(at)
                while at < stop:
                    block = stream.read(min(BLOCK, stop - at))
                    if not block:
                        raise _Broken(f"the file ends at byte {at:,} of {stop:,}")
                    at += len(block)
                    failures = 0
                    yield block
            return
        except OSError as error:
            failures += 1
            if failures == READ_ATTEMPTS or isinstance(error, (FileNotFoundError, PermissionError)):
                raise _Broken(f"the file cannot be read: {one_line(error)}") from None
            time.sleep(0.2 * 4**failures)


def _gunzip(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """All members of a gzip file."""
    engine = zlib.decompressobj(31)
    begun = False  # within a member
    for block in blocks:
        while block:
            if not begun and not (block := block.lstrip(b"\0")):  # zeros pad the end of some files
                break
            begun = True
            before = engine.copy()
            try:
                text = engine.decompress(block, BLOCK)
            except zlib.error as error:
                yield from _up_to_damage(before, block)
                raise _Broken(f"the gzip stream is damaged ({one_line(error)})") from None
            if text:
                yield text
            block = engine.unconsumed_tail
            if engine.eof:
                block, engine, begun = engine.unused_data, zlib.decompressobj(31), False
            elif not block and len(text) == BLOCK:
                while text := engine.decompress(b"", BLOCK):  # what the bound held back
                    yield text
                    if engine.eof:
                        block, engine, begun = engine.unused_data, zlib.decompressobj(31), False
                        break
    if begun:
        raise _Broken("the gzip stream ends early")


def _up_to_damage(engine: Any, block: bytes) -> Iterator[bytes]:
    """The text of a block that ends in an error: zlib gives all of a call's output or none."""
    for step in (4096, 1):
        while block:
            before = engine.copy()
            try:
                text = engine.decompress(block[:step])
            except zlib.error:
                engine = before
                break
            if text:
                yield text
            block = block[step:]


def _unzstd(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """All frames of a zstd file."""
    try:
        import zstandard
    except ImportError:
        raise _Broken("zstd files need the package 'zstandard'") from None
    open_frame: Callable[[], Any] = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    engine = open_frame()
    begun = False
    for block in blocks:
        for at in range(0, len(block), ZSTD_SLICE):
            piece = block[at : at + ZSTD_SLICE]
            while piece:
                begun = True
                try:
                    text = engine.decompress(piece)
                except zstandard.ZstdError as error:
                    raise _Broken(f"the zstd stream is damaged ({one_line(error)})") from None
                if text:
                    yield text
                if not engine.eof:
                    break
                piece, engine, begun = engine.unused_data, open_frame(), False
    if begun:
        raise _Broken("the zstd stream ends early")


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Small pieces joined into blocks."""
    held: list[bytes] = []
    size = 0
    try:
        for piece in pieces:
            held.append(piece)
            size += len(piece)
            if size >= BLOCK:
                yield b"".join(held)
                held, size = [], 0
    except _Broken:
        if held:
            yield b"".join(held)
        raise
    if held:
        yield b"".join(held)


# --- Parquet ---------------------------------------------------------------------------------------------------------


def parquet_schema(chunk: Chunk) -> pa.Schema:
    """The columns of a Parquet chunk's batches. Raises what pyarrow does where the file is gone."""
    fs, path = resolve(chunk.file)
    with fs.open_input_file(path) as stream:
        schema = pq.ParquetFile(stream).schema_arrow
    return pa.schema([schema.field(at) for at in _distinct(schema.names)])


def read_table(chunk: Chunk, batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """The batches of a Parquet chunk with their own types, one for each batch of `read_chunk`.

    Rows that cannot be read are one row of nulls, as they are one row with an error there.
    """
    for _, batch, _ in _parquet_batches(chunk, batch_rows):
        yield batch


def _distinct(names: Sequence[str]) -> list[int]:
    """Positions of the columns, without further ones of the same name."""
    first: dict[str, int] = {}
    for at, name in enumerate(names):
        first.setdefault(name, at)
    return list(first.values())


def _one_null_row(schema: pa.Schema) -> pa.RecordBatch:
    if not schema.names:
        return pa.RecordBatch.from_struct_array(pa.array([{}], pa.struct([])))
    return pa.RecordBatch.from_arrays([pa.nulls(1, f.type) for f in schema], names=schema.names)


def _parquet_batches(chunk: Chunk, batch_rows: int) -> Iterator[tuple[int, pa.RecordBatch, str | None]]:
    """(row number, batch, None), or (row number, one row of nulls, why the rows of this row group are missing)."""
    row = chunk.first_row
    schema = pa.schema([])
    try:
        fs, path = resolve(chunk.file)
        with fs.open_input_file(path) as stream:
            file = pq.ParquetFile(stream)
            schema = pa.schema([file.schema_arrow.field(at) for at in _distinct(file.schema_arrow.names)])
            for group in range(chunk.start, chunk.stop):
                end = row + file.metadata.row_group(group).num_rows
                for batch, error in _group_batches(file, group, batch_rows):
                    if batch is None:
                        reason = f"the Parquet file is damaged ({error}): its rows {row:,} to {end - 1:,} are missing"
                        yield row, _one_null_row(schema), reason
                        break
                    yield row, batch, None
                    row += batch.num_rows
                row = end
    except (OSError, pa.ArrowException) as error:
        reason = f"the Parquet file cannot be read ({one_line(error)}): rows from {row:,} on are missing"
        yield row, _one_null_row(schema), reason


def _group_batches(file: pq.ParquetFile, group: int, batch_rows: int) -> Iterator[tuple[pa.RecordBatch | None, str]]:
    """The batches of one row group, smaller where rows are long; then (None, why) if it breaks off."""
    about = file.metadata.row_group(group)
    row_bytes = max(1, about.total_byte_size // max(1, about.num_rows))
    size = max(1, min(batch_rows, BATCH_BYTES // row_bytes))
    try:
        for batch in file.iter_batches(size, row_groups=[group]):
            distinct = _distinct(batch.schema.names)
            yield (batch if len(distinct) == batch.num_columns else batch.select(distinct)), ""
    except (OSError, pa.ArrowException, ValueError) as error:
        yield None, one_line(error)


def _rows_of(first_row: int, batch: pa.RecordBatch) -> list[Row]:
    """Rows as Python values. A value that Python cannot hold is its text; where it has none, the row has an error."""
    errors: dict[int, str] = {}
    columns = [_values(name, column, errors) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
    names = batch.schema.names
    values = zip(*columns, strict=True) if columns else ((),) * batch.num_rows
    rows = [Row(number, ArrowRow(zip(names, row, strict=True))) for number, row in enumerate(values, first_row)]
    for at, error in errors.items():
        rows[at] = Row(first_row + at, None, error)
    return rows


def _values(name: str, column: pa.Array, errors: dict[int, str]) -> list[Any]:
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        # Nanoseconds become pandas objects where pandas is installed; without them the value is an ordinary datetime.
        try:
            column = column.cast(pa.timestamp("us", column.type.tz))
        except pa.ArrowInvalid:
            pass
        else:
            return _values(name, column, errors)
    try:
        values: list[Any] = column.to_pylist()
        return values
    except Exception:  # pyarrow has no one error for it: dates after the year 9999, text that is not UTF-8, …
        return [_value(name, at, cell, errors) for at, cell in enumerate(column)]


def _value(name: str, at: int, cell: pa.Scalar, errors: dict[int, str]) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        errors.setdefault(at, f"column {name!r:.80}: invalid UTF-8 at byte {error.start + 1}")
    except Exception as error:
        try:
            return cell.cast(pa.string()).as_py()
        except Exception:
            errors.setdefault(at, f"column {name!r:.80}: {one_line(error)}")
    return None
