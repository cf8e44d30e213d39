"""Reads rows from JSON: lines with one object each, or values that span lines, such as an array of objects."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from engines.text import one_line
from pipeline.dataset.file_split import RAW_BYTES, FileSplit, RawRow
from pipeline.dataset.text_stream import BLOCK, BOM, READ_ERRORS, open_text
from pipeline.storage.exact_json import has_long_number, loads
from pipeline.storage.retry import store_failed

# Finds the end of a value. The value itself is parsed by `loads`, which is exact, so numbers are not converted here.
_DECODER = json.JSONDecoder(parse_float=str, parse_int=str, strict=False)
_SPACE = re.compile(r"[ \t\r\n]*")


def parse_row(number: int, text: bytes, limit: int, long_number: bool = True) -> RawRow:
    """One JSON object as a row."""
    size = len(text)
    if size > limit:
        return RawRow(number, None, too_long(size, limit), text[:RAW_BYTES], limit)
    try:
        value = loads(text, long_number)
    except ValueError as error:
        return RawRow(number, None, str(error), text[:RAW_BYTES], size)
    if type(value) is not dict:
        kind = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
        return RawRow(number, None, f"not an object but {kind}", text[:RAW_BYTES], size)
    return RawRow(number, value, None, None, size)


def too_long(length: int, limit: int) -> str:
    return f"the row has {length:,} bytes, the limit is {limit:,} (dataset.max_row_bytes)"


def unreadable(number: int, error: BaseException) -> RawRow:
    """The last row of a file that cannot be read to its end."""
    return RawRow(number, None, f"the file cannot be read: {one_line(error)}: the rows from here on are missing")


# --- lines -----------------------------------------------------------------------------------------------------------


def json_lines(file_split: FileSplit, limit: int) -> Iterator[RawRow]:
    """Yields a row for each line that is not blank. The number of a row is that of its line."""
    number = file_split.first_row
    try:
        for lines, passed, long_number in _lines(file_split, limit):
            for line in lines:
                if len(line) > limit:
                    length = len(line) + (passed if line is lines[-1] else 0)
                    yield RawRow(number, None, too_long(length, limit), line[:RAW_BYTES], RAW_BYTES)
                elif line and not line.isspace():
                    yield parse_row(number, line, limit, long_number)
                number += 1
    except READ_ERRORS as error:
        if store_failed(error):
            raise
        yield unreadable(number, error)


def _lines(file_split: FileSplit, limit: int) -> Iterator[tuple[list[bytes], int, bool]]:
    """For each block: the lines that end in it, how many bytes of the last line were skipped, and True if a line may have a
    long number.

    The end of a line over `limit` bytes is skipped, not kept in memory. Raises if the file ends too early or is damaged.
    """
    at, rest, block = file_split.start, b"", b"begin"
    plain = file_split.stop >= 0
    stop = file_split.stop if plain else sys.maxsize
    with open_text(file_split.file, at, plain=plain) as stream:
        while block:
            block = stream.read1(min(BLOCK, stop - at))
            if not block and at < file_split.stop:
                raise EOFError(f"it ends at byte {at:,} of {file_split.stop:,}")
            text = rest + (block or b"\n")
            text = text if at else text.removeprefix(BOM)
            at += len(block)
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


# --- values ----------------------------------------------------------------------------------------------------------


def json_values(file_split: FileSplit, limit: int) -> Iterator[RawRow]:
    """Yields a row for each value of a file: each element of an array, or each value of a sequence of values.

    Damage ends the file with an error row, because the start of the next value is not known.
    """
    number = 0
    try:
        with open_text(file_split.file) as stream:
            for text in _values(_Text(stream), limit):
                yield parse_row(number, text, limit)
                number += 1
    except READ_ERRORS as error:
        if store_failed(error):
            raise
        yield unreadable(number, error)


class _Text:
    """A window of a stream as text. Bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.window, self.at, self.ended = "", 0, False

    def more(self) -> bool:
        """Doubles the rest of the window. False if the stream has ended."""
        if self.ended:
            return False
        parts, missing = [self.window[self.at :]], max(BLOCK, len(self.window) - self.at)
        while missing > 0 and not self.ended:
            block = self.stream.read1(BLOCK)
            self.ended = not block
            parts.append(self.decoder.decode(block, self.ended))
            missing -= len(block)
        self.window, self.at = "".join(parts), 0
        return True

    def next_character(self) -> str:
        """The next character that is not white space, without passing it. Empty at the end."""
        while True:
            found = _SPACE.match(self.window, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.window) or not self.more():
                return self.window[self.at : self.at + 1]

    def value(self, limit: int) -> bytes:
        """Passes the next value and returns its text. Raises `ValueError` if it is damaged or far over `limit` bytes."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self.window, self.at)
                if end < len(self.window) or not self.more():  # a number may go on behind the window
                    break
            except RecursionError:
                raise ValueError("a value is nested too deep") from None
            except json.JSONDecodeError as error:
                if len(self.window) - self.at > limit:
                    raise ValueError(f"a value is damaged, or has more than {limit:,} bytes ({error.msg})") from None
                if not self.more():
                    raise ValueError(f"invalid JSON: {error.msg.removesuffix(' at')}") from None
        text, self.at = self.window[self.at : end], end
        return text.encode("utf-8", "surrogateescape")


def _values(text: _Text, limit: int) -> Iterator[bytes]:
    """The texts of the values of a file. Those of an array are its elements."""
    in_array = follows = False  # `follows`: a value of the array was read, and a comma or the end must come
    while character := text.next_character():
        if not in_array and character == "[":
            in_array, follows = True, False
            text.at += 1
        elif in_array and (character == "]" or (follows and character == ",")):
            in_array, follows = character == ",", False
            text.at += 1
        elif follows:
            raise ValueError(f"invalid JSON: {character!r} between two elements of the array")
        else:
            yield text.value(limit)
            follows = in_array
    if in_array:
        raise ValueError("the array does not end")


def spans_lines(head: bytes, whole: bool) -> bool | None:
    """True if a JSON file with this beginning is an array, or has values that span lines; False if it has one value on
    each line; None if only a longer head shows it. `whole`: the head is the whole file."""
    text = head.lstrip()
    if text.startswith(b"["):
        return True
    first, newline, _ = text.partition(b"\n")
    if not newline or not first.startswith(b"{") or _parses(first):
        return False
    decoded = text.decode("utf-8", "replace")
    try:
        _DECODER.raw_decode(decoded)
    except RecursionError:
        return False
    except json.JSONDecodeError as error:  # an error at the end of the head: the value goes on behind it
        cut = error.pos > len(decoded) - 16 or error.msg.startswith("Unterminated string")
        return None if cut and not whole else False
    return True


def _parses(line: bytes) -> bool:
    try:
        loads(line)
    except ValueError:
        return False
    return True
