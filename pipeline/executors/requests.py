"""Reads the rows that need an answer (`read_split`), and makes the engines' requests of them (`request_of`).

Between the two, a request is the JSON in `PendingRequest`. `to_request` (`engines/types.py`) does the same as `request_of`
for the conversations of programs.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from engines.errors import ConfigError
from engines.params import GenerationParams
from engines.tasks import CHAT
from engines.types import Request
from pipeline.dataset.formats import Parsed
from pipeline.dataset.occurrences import Occurrences
from pipeline.dataset.reader import ParsedRow, ReadSplit, RowReader, SplitSummary
from pipeline.storage.exact_json import dumps
from pipeline.storage.ledger_index import DONE, DONE_TRUNCATED, FAILED, MISSING, KeyLookup

# Conversations with the same model and adapter that agree in this many first characters share a cached prefix.
PREFIX_CHARACTERS = 256
# The fields of `Parsed` that a request has if they are set.
_OPTIONAL = ("generation", "model", "adapter", "turns", "extra_body", "continue_answer", "inputs")
_optional_values = attrgetter(*_OPTIONAL)
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
    """A row whose request is to be sent."""

    key: bytes
    id: str
    request: bytes  # JSON: see `request_of`
    prefix: int  # equal for rows whose prompts begin with the same text
    max_tokens: int  # the row's own limit, or 0


def prefix_of(parsed: Parsed) -> int:
    """63 bits that are equal for conversations whose prompts begin with the same text."""
    content = parsed.messages[0].get("content") if parsed.messages else next(iter(parsed.inputs.values()), None)
    start = (content if isinstance(content, str) else dumps(content).decode())[:PREFIX_CHARACTERS]
    return _hash(f"{parsed.model}\0{parsed.adapter}\0{start}")


@functools.lru_cache(maxsize=256)  # rows with one prefix often follow each other
def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big") >> 1


def read_split(
    split: ReadSplit,
    row_reader: RowReader,
    done: KeyLookup,
    fail_on_bad_input: bool,
    summary: SplitSummary,
    occurrences: Occurrences | None = None,
) -> Iterator[pa.Table]:
    """Yields tables of the rows of `split` that `done` does not have, and fills `summary`.

    A caller that reads all splits, in order, passes one `occurrences` for all of them.
    """
    occurrences = occurrences or Occurrences(split.earlier)
    for items in row_reader.read(split, occurrences):
        summary.add(items, split)
        good = [item for item in items if item.failure is None]
        if len(good) < len(items) and fail_on_bad_input:
            first = next(item.failure for item in items if item.failure is not None)
            text = f"{first.message} (dataset.on_bad_input=quarantine makes it an error row)"
            raise ConfigError(text, key="dataset.on_bad_input")
        results = row_reader.results(good, done)
        wanted = np.flatnonzero(results == MISSING)
        summary.failed += int(np.count_nonzero(results == FAILED))
        summary.truncated += int(np.count_nonzero(results == DONE_TRUNCATED))
        summary.answered += int(np.count_nonzero((results == DONE) | (results == DONE_TRUNCATED)))
        if len(wanted):
            yield _table([good[at] for at in wanted])
    summary.earlier = occurrences.earlier()


def _table(items: list[ParsedRow]) -> pa.Table:
    pending = [(item.key, item.id, item.parsed) for item in items if item.key and item.parsed]
    columns = (
        [key for key, _, _ in pending],
        [id for _, id, _ in pending],
        [request_json(parsed) for _, _, parsed in pending],
        [prefix_of(parsed) for _, _, parsed in pending],
        [_max_tokens(parsed) for _, _, parsed in pending],
    )
    return pa.Table.from_arrays(
        [pa.array(column, kind) for column, kind in zip(columns, ROWS_SCHEMA.types, strict=True)], schema=ROWS_SCHEMA
    )


def _max_tokens(parsed: Parsed) -> int:
    limit = parsed.generation.get("max_tokens")
    return limit if isinstance(limit, int) and limit < 1 << 62 else 0


def request_json(parsed: Parsed) -> bytes:
    """A row's request as JSON; `request_of` reads it."""
    request: dict[str, Any] = {"messages": parsed.messages}
    values = _optional_values(parsed)
    if any(values):
        request |= {name: value for name, value in zip(_OPTIONAL, values, strict=True) if value}
    if parsed.task != CHAT:
        request["task"] = parsed.task
    return dumps(request)


def request_of(values: Mapping[str, Any], generation: GenerationParams, key: bytes) -> Request:
    """The request in `values`, the parsed JSON of a `PendingRequest`; the row's own parameters override `generation`.

    Raises `EngineError`.
    """
    task = values.get("task", CHAT)
    generation = generation if task == CHAT else generation.for_task(task)
    return Request(
        messages=values["messages"],
        generation=generation.override(values.get("generation") or {}),
        model=values.get("model"),
        adapter=values.get("adapter"),
        key=key.hex(),
        turns=values.get("turns") or [],
        extra_body=values.get("extra_body") or {},
        continue_answer=bool(values.get("continue_answer")),
        own_generation=bool(values.get("generation")),
        task=task,
        inputs=values.get("inputs") or {},
    )
