"""Reads rows from CSV and TSV files. Each cell is text, an empty cell is null, and a quoted empty cell is an empty text."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

from engines.text import one_line
from pipeline.dataset.file_split import RAW_BYTES, FileSplit, RawRow
from pipeline.dataset.formats import TextRow
from pipeline.dataset.json_rows import too_long, unreadable
from pipeline.dataset.text_stream import READ_ERRORS, open_text
from pipeline.storage.retry import store_failed

DELIMITERS = ",;\t|"


def csv_rows(file_split: FileSplit, limit: int) -> Iterator[RawRow]:
    """Yields a row for each record after the header. The number of a row is that of its first line.

    A record with the wrong number of cells, wrong quotes or invalid UTF-8 is an error row. Blank lines are skipped.
    """
    csv.field_size_limit(max(limit, csv.field_size_limit()))
    records = None
    try:
        with open_text(file_split.file) as stream:
            records = _Records(stream, _is_tsv(file_split.name), limit)
            names = [name.strip() for name in records.next_cells() or []]
            while (row := records.next_row(names)) is not None:
                row.size = records.size
                yield row
    except READ_ERRORS as error:
        if store_failed(error):
            raise
        yield unreadable(records.line if records else 0, error)


def header_problem(head: bytes, name: str, whole: bool) -> str:
    """The reason why a CSV file with this beginning cannot be read. Empty if it can, or if the header is longer. `whole`:
    the head is the whole file."""
    lines = head if whole else head[: head.rfind(b"\n") + 1]
    reader = csv.reader(map(_decoded, io.BytesIO(lines)), **_dialect(lines, _is_tsv(name)))
    try:
        names = [name.strip() for name in next(filter(None, reader), [])]
    except csv.Error as error:
        return f"not a CSV file: its header: {one_line(error)}"
    if not lines.isascii() and lines.decode(errors="ignore").isascii():
        return "not UTF-8 text: save it as UTF-8"
    repeated = next((name for name in names if names.count(name) > 1), None)
    return f"a CSV file with two columns named {repeated!r}" if repeated is not None else ""


def _is_tsv(name: str) -> bool:
    return re.search(r"\.tsv(\.\w+)?$", name, re.IGNORECASE) is not None


def _dialect(head: bytes, tsv: bool) -> dict[str, Any]:
    """The options of `csv.reader`. Of several possible delimiters, the most frequent one in the header is taken."""
    header = re.sub(rb'"[^"]*"', b"", head.lstrip().partition(b"\n")[0])
    delimiter = "\t" if tsv else max(DELIMITERS, key=lambda mark: header.count(mark.encode()))
    return {"delimiter": delimiter, "strict": True}


def _decoded(line: bytes) -> str:
    """The line as text. Bytes that are not UTF-8 become lone surrogates."""
    return line.decode("utf-8", "surrogateescape")


class _Records:
    """The records of a CSV file, one after the other."""

    def __init__(self, stream: Any, tsv: bool, limit: int) -> None:
        self.stream, self.limit = stream, limit
        dialect = _dialect(stream.peek(RAW_BYTES), tsv)
        self.reader = csv.reader(self._lines(), **dialect)
        self.line = self.size = 0  # of the last record: the lines before it, and its bytes
        self.lines: list[str] = []  # of the last record
        mark = re.escape(dialect["delimiter"])
        self.cell = re.compile(rf'("[^"]*(?:""[^"]*)*"|[^{mark}]*)(?:{mark}|\Z)')

    def _lines(self) -> Iterator[str]:
        while line := self.stream.readline(self.limit + 1):
            self.size += len(line)
            if self.size > self.limit:
                raise ValueError(f"{too_long(self.size, self.limit)}; or a quote does not close")
            self.lines.append(_decoded(line))
            yield self.lines[-1]

    def next_cells(self) -> list[str] | None:
        """The cells of the next record that is not blank. None at the end. Raises `csv.Error`."""
        while True:
            self.line, self.size = self.reader.line_num, 0
            self.lines.clear()
            cells = next(self.reader, None)
            if cells or cells is None:
                return cells

    def next_row(self, names: list[str]) -> RawRow | None:
        """The next record as a row. None at the end."""
        try:
            cells = self.next_cells()
        except csv.Error as error:
            return self._error(_reason(error))
        if cells is None:
            return None
        if len(cells) != len(names):
            return self._error(f"the row has {len(cells)} cells, the header has {len(names)}")
        text = "".join(self.lines)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return self._error(f"invalid UTF-8 in the row, at character {error.start + 1}")
        if "" not in cells:
            return RawRow(self.line, TextRow(zip(names, cells, strict=True)))
        written = self.cell.findall(text.rstrip("\r\n")) if '""' in text else cells
        values = [cell or (None if written[at] == "" else "") for at, cell in enumerate(cells)]
        return RawRow(self.line, TextRow(zip(names, values, strict=True)))

    def _error(self, reason: str) -> RawRow:
        text = "".join(self.lines).encode("utf-8", "surrogateescape")
        return RawRow(self.line, None, reason, text[:RAW_BYTES])


def _reason(error: csv.Error) -> str:
    if str(error) == "unexpected end of data":
        return "a quote in this row does not close: the rest of the file belongs to it"
    return f"invalid CSV: {error}"
