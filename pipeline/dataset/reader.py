"""Parses the raw rows that `read.py` reads: each becomes a key and a conversation, or an error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.errors import EngineError, Failure, invalid
from engines.registry import kind_of
from pipeline.dataset.column_types import ColumnKinds
from pipeline.dataset.file_split import FileSplit, RawRow
from pipeline.dataset.formats import Parsed, RowParser
from pipeline.dataset.keys import RequestHasher, numbered
from pipeline.dataset.occurrences import NONE_EARLIER, Earlier, Occurrences
from pipeline.dataset.read import read_file_split
from pipeline.storage.ledger_index import MISSING, KeyLookup


@dataclass(frozen=True, slots=True)
class ReadSplit:
    """The rows of one read task."""

    number: int
    file_split: FileSplit
    # The rows of earlier splits that have keys of rows in this split, as far as they are known.
    earlier: Earlier = field(default=NONE_EARLIER, compare=False)


@dataclass(slots=True)
class ParsedRow:
    """One parsed input row. It has either a key and a conversation, or a failure that says why it cannot be asked."""

    row: RawRow
    place: str  # file and row number
    id: str
    key: bytes | None = None
    parsed: Parsed | None = None
    failure: Failure | None = None
    is_numbered: bool = False  # each row with its key is asked; `number` is its position among them
    number: int = 0
    names_files: bool = False  # its request names a local file or adapter
    old_place: str = ""  # with the file's name in earlier versions, if it differs
    old_place_key: bytes | None = None  # if the key covers the place


@dataclass(frozen=True)
class RowReader:
    """Reads rows. The executors and finalize use the same reader, so both see the same rows. Small: every task gets one."""

    parser: RowParser
    hasher: RequestHasher
    max_row_bytes: int

    def read(self, split: ReadSplit, occurrences: Occurrences | None = None) -> Iterator[list[ParsedRow]]:
        """The rows of a split with their final keys, in order and in batches.

        A caller that reads all splits, in order, counts over all of them with `occurrences`. Otherwise the rows of earlier
        splits are those in `split.earlier`.
        """
        occurrences = occurrences or Occurrences(split.earlier)
        occurrences.begin_split()
        for items in self.parse(split):
            some = [item for item in items if item.is_numbered and item.key is not None]
            if some:
                for item, number in zip(some, occurrences.number([item.key or b"" for item in some]), strict=True):
                    item.number, item.key = number, numbered(item.key or b"", number)
            yield items

    def parse(self, split: ReadSplit) -> Iterator[list[ParsedRow]]:
        """The rows of a split, before those with equal keys are numbered."""
        for rows in read_file_split(split.file_split, max_row_bytes=self.max_row_bytes):
            yield [self._parsed_row(split.file_split, row) for row in rows]

    def old_key(self, item: ParsedRow, until_ms: int) -> bytes | None:
        """As `RequestHasher.old_key`. Only the first of rows with equal keys has one: earlier versions asked them once."""
        if item.parsed is None or item.number:
            return None
        return self.hasher.old_key(item.parsed, item.old_place or item.place, until_ms)

    def results(self, items: Sequence[ParsedRow], done: KeyLookup) -> npt.NDArray[np.int8]:
        """As `KeyLookup.results`, for rows that have keys: by the key of an earlier version if there is no other."""
        keep_old_keys(items, done)
        results = done.results([item.key or b"" for item in items])
        if done.old_until_ms:
            missing = np.flatnonzero(results == MISSING).tolist()
            old = {at: key for at in missing if (key := self.old_key(items[at], done.old_until_ms)) is not None}
            if old:
                results[list(old)] = done.results(list(old.values()))
        return results

    def _parsed_row(self, file_split: FileSplit, row: RawRow) -> ParsedRow:
        place = f"{file_split.name}:{row.row + 1}"
        old_place = f"{file_split.old_name}:{row.row + 1}" if file_split.old_name else ""
        if row.columns is None:
            return ParsedRow(row, place, place, failure=_invalid_row(place, row.error or "unreadable"))
        try:
            parsed = self.parser.parse(row.columns)
            self._ignore_model(parsed, row.columns)
            found = self.hasher.row_key(parsed, place)
            old_key = self.hasher.key(parsed, old_place) if old_place and found.names_place else None
        except EngineError as error:
            own = self.parser.id_of(row.columns)
            return ParsedRow(row, place, place if own is None else own, failure=_invalid_row(place, str(error)))
        id = parsed.id if parsed.id is not None else place
        return ParsedRow(
            row,
            place,
            id,
            found.key,
            parsed,
            is_numbered=found.is_numbered,
            names_files=found.names_files,
            old_place=old_place,
            old_place_key=old_key,
        )

    def _ignore_model(self, parsed: Parsed, columns: dict[str, Any]) -> None:
        """An engine that holds one model ignores the name of another one, unless `dataset.columns` names its column.

        Every line of an OpenAI batch file names a model, and tables name the model that a row is about.
        """
        if parsed.model is None:
            return
        engine = self.hasher.engine
        one_model = kind_of(engine).holds_model and "model" not in self.parser.columns
        if one_model and ("body" in columns or parsed.model != engine.model):
            parsed.model = None


def keep_old_keys(items: Sequence[ParsedRow], done: KeyLookup) -> None:
    """Gives the rows that the ledger has only under the key of an earlier version this key. The earlier version had another
    name for their file."""
    renamed = [item for item in items if item.old_place_key is not None]
    if renamed:
        under_old = done.results([item.old_place_key or b"" for item in renamed])
        under_new = done.results([item.key or b"" for item in renamed])
        for at in np.flatnonzero((under_new == MISSING) & (under_old != MISSING)).tolist():
            renamed[at].key = renamed[at].old_place_key


def _invalid_row(place: str, reason: str) -> Failure:
    return Failure.of(invalid(f"{place}: {reason}"))


def size_of(value: Any) -> int:
    """About the number of bytes that a value of a row takes."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(size_of, value.values())) + 8 * len(value)
    if isinstance(value, list):
        return sum(map(size_of, value)) if value and isinstance(value[0], (str, bytes, dict, list)) else 8 * len(value)
    return 8


# Sizes of rows are summed up over blocks of up to this many bytes.
BLOCK_BYTES = 8 << 20


@dataclass(slots=True)
class SplitSummary:
    """What was found in one split that was read."""

    rows: int = 0
    invalid: int = 0
    # Rows that were skipped, because the ledger has their results. The truncated ones are some of the answered ones.
    answered: int = 0
    failed: int = 0
    truncated: int = 0
    kinds: ColumnKinds = field(default_factory=ColumnKinds)  # of columns without types
    params: set[str] = field(default_factory=set)  # generation parameters that rows set for themselves
    tasks: set[str] = field(default_factory=set)  # of the rows
    references: int = 0  # rows whose last answer is not sent, but goes into the column `reference`
    blocks: list[tuple[int, int]] = field(default_factory=list)  # rows and about their bytes, in order
    earlier: Earlier = NONE_EARLIER  # see `ReadSplit`; complete if the reader read all splits
    contents: int = 0  # a sum over the keys of rows with `names_files`: it changes with the content of a file

    def add(self, items: Sequence[ParsedRow], split: ReadSplit) -> None:
        """Adds rows of the split."""
        self.rows += len(items)
        if not split.file_split.typed:
            self.kinds.add([item.row.columns for item in items if item.row.columns is not None])
        rows, bytes = self.blocks.pop() if self.blocks else (0, 0)
        for item in items:
            row, parsed = item.row, item.parsed
            size = row.size or (size_of(row.columns) if row.columns is not None else len(row.raw or b""))
            if rows and bytes + size > BLOCK_BYTES:
                self.blocks.append((rows, bytes))
                rows = bytes = 0
            rows, bytes = rows + 1, bytes + size
            if parsed is None:
                self.invalid += 1
                continue
            if parsed.generation:
                self.params.update(parsed.generation)
            self.tasks.add(parsed.task)
            self.references += parsed.reference is not None
            if item.names_files and item.key is not None:
                self.contents = (self.contents + int.from_bytes(item.key[:8], "big")) % (1 << 63)
        if rows:
            self.blocks.append((rows, bytes))
