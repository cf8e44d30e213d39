"""Reads the rows that still need an answer (`read_split`), and makes engine requests of them (`request_of`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from engines.errors import ConfigError
from engines.params import GenerationParams
from engines.types import Request
from pipeline.dataset.formats import Parsed
from pipeline.dataset.reader import ParsedRow, ReadSplit, RowReader, SplitSummary
from pipeline.storage.exact_json import dumps
from pipeline.storage.ledger_index import KeyLookup

# Conversations with the same model and adapter that agree in this many first characters share a cached prefix.
PREFIX_CHARACTERS = 256
# The columns of `PendingRequest`.
ROWS_SCHEMA = pa.schema(
    [
        ("key", pa.binary(32)),
        ("id", pa.string()),
        ("request", pa.binary()),
        ("prefix", pa.int64()),
        ("max_tokens", pa.int64()),
    ]
)


class PendingRequest(NamedTuple):
    """One row to ask."""

    key: bytes
    id: str
    request: bytes  # JSON: see `request_of`
    prefix: int  # equal for rows whose prompts begin with the same text
    max_tokens: int  # the row's own limit, or 0


def prefix_of(parsed: Parsed) -> int:
    """63 bits that are equal for conversations whose prompts begin with the same text."""
    content = parsed.messages[0].get("content") if parsed.messages else None
    start = (content if isinstance(content, str) else dumps(content).decode())[:PREFIX_CHARACTERS]
    name = f"{parsed.model}\0{parsed.adapter}\0{start}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def read_split(
    split: ReadSplit, row_reader: RowReader, done: KeyLookup, fail_on_bad_input: bool, summary: SplitSummary
) -> Iterator[pa.Table]:
    """Yields tables of the rows of `split` that `done` does not have, and fills `summary`."""
    for items in row_reader.read(split):
        summary.rows += len(items)
        if split.file_split.kind != "parquet":
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


def _table(items: list[ParsedRow]) -> pa.Table:
    pending = [_pending_request(item.key, item.id, item.parsed) for item in items if item.key and item.parsed]
    columns = zip(*pending, strict=True)
    return pa.Table.from_arrays(
        [pa.array(column, kind) for column, kind in zip(columns, ROWS_SCHEMA.types, strict=True)], schema=ROWS_SCHEMA
    )


def _pending_request(key: bytes, id: str, parsed: Parsed) -> PendingRequest:
    limit = parsed.generation.get("max_tokens")
    return PendingRequest(
        key, id, _request(parsed), prefix_of(parsed), limit if isinstance(limit, int) and limit < 1 << 62 else 0
    )


def _request(parsed: Parsed) -> bytes:
    request: dict[str, Any] = {"messages": parsed.messages}
    for name in ("generation", "model", "adapter", "turns"):
        if value := getattr(parsed, name):
            request[name] = value
    return dumps(request)


def request_of(values: Mapping[str, Any], generation: GenerationParams, key: bytes) -> Request:
    """The request of a `PendingRequest`; the row's own parameters override `generation`. Raises `EngineError`."""
    return Request(
        messages=values["messages"],
        generation=generation.override(values.get("generation") or {}),
        model=values.get("model"),
        adapter=values.get("adapter"),
        key=key.hex(),
        turns=values.get("turns") or [],
    )
