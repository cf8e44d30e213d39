"""Rows of the input as requests: read, parsed, keyed, without those that the ledger has. Also the messages between the
dispatcher, its workers and the driver."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from engines.base import SINGLE_MODEL_KINDS
from engines.types import ConfigError, EngineError, Failure, GenerationParams, Request, invalid
from pipeline.budget import Seen
from pipeline.formats import Parsed, RowParser
from pipeline.keys import Keyer
from pipeline.ledger import FarIndex, Index
from pipeline.lossless import dumps
from pipeline.ready import Ask, prefix_of
from pipeline.schema import ColumnKinds
from pipeline.source import Chunk, Row, read_chunk

# The columns of `Ask`.
ROWS_SCHEMA = pa.schema(
    [
        ("key", pa.binary(32)),
        ("id", pa.string()),
        ("request", pa.binary()),
        ("prefix", pa.int64()),
        ("max_tokens", pa.int64()),
    ]
)


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


def read_piece(
    piece: Piece, interpreter: Interpreter, done: Index | FarIndex, fail_on_bad_input: bool, summary: Summary
) -> Iterator[pa.Table]:
    """Tables of the rows of `piece` that are still to be asked; fills `summary` on the way."""
    for items in interpreter.read(piece):
        summary.rows += len(items)
        if piece.chunk.kind != "parquet":
            summary.kinds.add([item.row.columns for item in items if item.row.columns is not None])
        good = [item for item in items if item.failure is None]
        if len(good) < len(items):
            summary.invalid += len(items) - len(good)
            if fail_on_bad_input:
                first = next(item.failure for item in items if item.failure is not None)
                raise ConfigError(f"{first.message} (dataset.on_bad_input=quarantine would go on)")
        for item in good:
            if item.parsed is not None and item.parsed.generation:
                summary.params.update(item.parsed.generation)
        wanted = np.flatnonzero(done.find([item.key or b"" for item in good]) < 0)
        summary.answered += len(good) - len(wanted)
        if len(wanted):
            yield _table([good[at] for at in wanted])


def _table(items: list[Item]) -> pa.Table:
    asks = [_ask(item.key, item.id, item.parsed) for item in items if item.key and item.parsed]
    columns = zip(*asks, strict=True)
    return pa.Table.from_arrays(
        [pa.array(column, kind) for column, kind in zip(columns, ROWS_SCHEMA.types, strict=True)], schema=ROWS_SCHEMA
    )


def _ask(key: bytes, id: str, parsed: Parsed) -> Ask:
    limit = parsed.generation.get("max_tokens")
    return Ask(key, id, _request(parsed), prefix_of(parsed), limit if isinstance(limit, int) and limit < 1 << 62 else 0)


def _request(parsed: Parsed) -> bytes:
    request: dict[str, Any] = {"messages": parsed.messages}
    for name in ("generation", "model", "adapter", "turns"):
        if value := getattr(parsed, name):
            request[name] = value
    return dumps(request)


def request_of(values: Mapping[str, Any], generation: GenerationParams, key: bytes) -> Request:
    """The request in what `_request` made, with its overrides laid over the run's parameters. Raises `EngineError`."""
    return Request(
        messages=values["messages"],
        generation=generation.override(values.get("generation") or {}),
        model=values.get("model"),
        adapter=values.get("adapter"),
        key=key.hex(),
        turns=values.get("turns") or [],
    )


def dataset_of(pieces: list[Piece], interpreter: Interpreter, done: Any, fail_on_bad_input: bool, report: Any) -> Any:
    """A Ray Dataset of the rows to ask. `done` is a reference to an index; `report(number, summary)` a remote method."""
    import ray
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def task(piece: Piece) -> ReadTask:
        def read() -> Iterator[pa.Table]:
            summary = Summary()
            yield ROWS_SCHEMA.empty_table()
            yield from read_piece(piece, interpreter, ray.get(done), fail_on_bad_input, summary)
            ray.get(report.remote(piece.number, summary))

        return ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None))

    class Conversations(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            return [task(piece) for piece in pieces]

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    # Small blocks: the first rows arrive while a file is still being read.
    context.target_max_block_size = 2 << 20
    context.target_min_block_size = 1
    # A provider that is down for an hour must not end the run from inside Ray Data.
    if hasattr(context, "execution_no_progress_timeout_s"):
        context.execution_no_progress_timeout_s = -1
    return ray.data.read_datasource(
        Conversations(),
        override_num_blocks=max(1, len(pieces)),
        # No CPU is reserved: replicas may have reserved all of them, and would wait for rows for ever.
        ray_remote_args={"num_cpus": 0, "max_retries": 3},
        concurrency=max(2, int(ray.cluster_resources().get("CPU", 2))),
    )


@dataclass(slots=True)
class Lease:
    """Rows lent to one worker until it reports them durable, or dies."""

    number: int
    keys: list[bytes]
    ids: list[str]
    requests: list[bytes]
    alone: bool = False  # on trial: no other row may be in the engine
    deaths: list[int] = field(default_factory=list)  # of engine processes, for each row; empty: none
    poison: str | None = None  # a poison row: it is recorded as failed, with this reason, and not asked
    last: bool = False  # the feed has nothing more at the moment

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(slots=True)
class Pulse:
    """How a replica fares, as it tells with the calls it makes anyway."""

    state: str = "loading"  # then "working", and "leaving" when it takes no more rows
    busy: int = 0  # rows in the engine
    done: int = 0  # rows that came out of it, failed ones included
    admitted: float | None = None  # requests that may be in flight just now
    most: int = 0  # and at most
    retried: int = 0
    throttled: int = 0
    waited_s: float = 0.0  # for the limits a minute
    trouble: str = ""


@dataclass(slots=True)
class Status:
    """How the run stands; rows."""

    read: int = 0
    invalid: int = 0
    answered: int = 0  # by earlier runs
    duplicates: int = 0  # held back, because an equal request is asked already
    done: int = 0
    failed: int = 0
    in_flight: int = 0
    workers: int = 0  # that have asked for rows and not left
    crashes: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0  # of this run, as far as it is known
    cost_unknown: int = 0  # rows whose cost is not known
    unpriced: list[tuple[int, int]] = field(default_factory=list)  # (lease, row) of these, for the budget
    seen: Seen = field(default_factory=Seen)
    replicas: dict[str, Pulse] = field(default_factory=dict)  # by name
    gone: Pulse = field(default_factory=Pulse)  # sums over the replicas that have left
    spent: float = 0.0  # of the budget, by all runs; in a worker's counts, by its rows since the last ones
    broke: bool = False  # the budget has no room for any row that is left
    left: int = 0  # rows at hand that nobody has
    errors: Counter[str] = field(default_factory=Counter)  # failures by type
    first_errors: dict[str, str] = field(default_factory=dict)  # an example of each type
    fed: bool = False  # everything is read
    finished: bool = False
    broken: str | None = None  # why reading the input failed
    trouble: str = ""  # what keeps all of it from going on, for now
