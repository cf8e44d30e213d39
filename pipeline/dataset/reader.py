"""Reads rows and turns each into a key and a conversation, or an error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from engines.config import SINGLE_MODEL_KINDS
from engines.errors import EngineError, Failure, invalid
from pipeline.dataset.column_types import ColumnKinds
from pipeline.dataset.formats import Parsed, RowParser
from pipeline.dataset.keys import Keyer
from pipeline.dataset.source import Chunk, Row, read_chunk


@dataclass(frozen=True, slots=True)
class Piece:
    """What one read task reads: a chunk, or its first `limit` rows."""

    number: int
    chunk: Chunk
    limit: int | None = None


@dataclass(slots=True)
class Item:
    """One input row, understood: either a key and its parsed conversation, or the reason why it cannot be asked."""

    row: Row
    id: str
    key: bytes | None = None
    parsed: Parsed | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Interpreter:
    """Reads rows the same way in the feed and in finalize; small, and sent to every task."""

    parser: RowParser
    keyer: Keyer
    max_row_bytes: int

    def read(self, piece: Piece) -> Iterator[list[Item]]:
        """The items of a piece in order, in batches."""
        left = piece.limit
        for rows in read_chunk(piece.chunk, max_row_bytes=self.max_row_bytes):
            if left is not None:
                rows = rows[:left]
                left -= len(rows)
            if rows:
                yield [self._item(piece.chunk, row) for row in rows]
            if left == 0:
                return

    def _item(self, chunk: Chunk, row: Row) -> Item:
        place = f"{chunk.name}:{row.row + 1}"
        if row.columns is None:
            return Item(row, place, failure=_misread(place, row.error or "unreadable"))
        try:
            parsed = self.parser.parse(row.columns)
            if parsed.model and "body" in row.columns and self.keyer.engine.kind in SINGLE_MODEL_KINDS:
                # Every line of an OpenAI batch file names a model; an engine that holds one model answers as that one.
                parsed.model = None
            key = self.keyer.key(parsed, place)
        except EngineError as error:
            return Item(row, place, failure=_misread(place, str(error)))
        return Item(row, parsed.id if parsed.id is not None else place, key, parsed)


def _misread(place: str, reason: str) -> Failure:
    return Failure.of(invalid(f"{place}: {reason}"))


@dataclass(slots=True)
class Summary:
    """What reading one piece found."""

    rows: int = 0
    invalid: int = 0
    answered: int = 0  # skipped: the ledger has them
    kinds: ColumnKinds = field(default_factory=ColumnKinds)  # of JSON columns; Parquet has types of its own
    params: set[str] = field(default_factory=set)  # generation parameters that rows set for themselves
