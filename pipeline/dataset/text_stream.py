"""Opens text files as streams of UTF-8: decompressed, and converted from UTF-16 or UTF-32."""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.storage.filesystem import resolve

# Bytes of one read. Small, because a read that finds damage in a compressed file loses its data.
BLOCK = 256 << 10
REMOTE_BLOCK = 4 << 20
# What a damaged or missing file may raise while it is read.
READ_ERRORS = (OSError, EOFError, ValueError, zlib.error, pa.ArrowException)

GZIP, ZSTD = re.compile(rb"\x1f\x8b"), re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
BOM = b"\xef\xbb\xbf"
# The longer marks come first: that of UTF-32 begins with that of UTF-16.
_WIDE = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


@contextlib.contextmanager
def open_text(uri: str, start: int = 0, *, plain: bool = False) -> Iterator[Any]:
    """Opens a file at the byte `start` as a buffered binary stream of UTF-8, with `read1` and `readline`.

    A byte order mark is not part of the stream. `plain`: the file is neither compressed nor in another encoding, and its
    bytes come as they are.
    """
    fs, path = resolve(uri)
    with fs.open_input_file(path) as file:
        head = b"" if plain else file.read(4)
        file.seek(start)
        stream = pa.BufferedInputStream(file, REMOTE_BLOCK)
        yield io.BufferedReader(stream, BLOCK) if plain else as_text(stream, head)


def as_text(stream: pa.NativeFile, head: bytes) -> Any:
    """A stream of a file that begins with `head` as a buffered stream of UTF-8. It closes `stream` with itself."""
    if GZIP.match(head):
        return _utf8(gzip.GzipFile(fileobj=stream))
    if ZSTD.match(head):  # not the package `zstandard`, which accepts a truncated file
        stream = pa.CompressedInputStream(stream, "zstd")
    return _utf8(io.BufferedReader(stream, BLOCK))


def _utf8(stream: Any) -> Any:
    mark = stream.peek(4)[:4]
    encoding = next((name for start, name in _WIDE.items() if mark.startswith(start)), None)
    if encoding:
        return io.BufferedReader(pa.transcoding_input_stream(pa.PythonFile(stream, "r"), encoding, "utf-8"), BLOCK)
    if mark.startswith(BOM):
        stream.read(len(BOM))
    return stream


def is_wide(head: bytes) -> bool:
    """True if a file with this beginning is UTF-16 or UTF-32."""
    return any(head.startswith(mark) for mark in _WIDE)


def read_head(stream: Any, size: int) -> bytes:
    """The first bytes of a stream, up to `size`; of a damaged stream, those before the damage. Raises if there are none."""
    head = b""
    try:
        while len(head) < size and (block := stream.read1(min(BLOCK, size - len(head)))):
            head += block
    except READ_ERRORS:
        if not head:
            raise
    return head
