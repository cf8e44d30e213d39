"""Tables as JSON lines: JSON text becomes JSON again, and the input's own values are written as they came."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
import pyarrow as pa

from pipeline.output.plan import OutputColumns
from pipeline.storage.exact_json import loads, plain

# Columns of ours that hold JSON text.
JSON_TEXT = ("messages", "tool_calls", "choices", "logprobs")


def data_lines(
    table: pa.Table, values: Sequence[Mapping[str, Any]], columns: OutputColumns, style: Callable[[Any], Any]
) -> bytes:
    """Lines of data/. `values` are the rows' columns as they came."""
    own = {c.name: c.source for c in columns.own if c.name is not None}
    in_json = {*JSON_TEXT, *(c.name for c in columns.answers if c.type is None)}
    lines = []
    for row, came in zip(table.to_pylist(), values, strict=True):
        for name in row:
            if name in own:
                row[name] = came.get(own[name])
            elif name in in_json:
                row[name] = _embedded(row[name])
        lines.append(_line(style(row)))
    return b"".join(lines)


def error_lines(table: pa.Table, columns: OutputColumns) -> bytes:
    """Lines of errors/."""
    in_json = {*JSON_TEXT, *(c.source for c in columns.own if c.type is None)}
    lines = []
    for row in table.to_pylist():
        lines.append(_line({name: _embedded(value) if name in in_json else value for name, value in row.items()}))
    return b"".join(lines)


def _embedded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return loads(value.encode())
    except ValueError:  # the input's own column of that name holds other text
        return value


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(row, default=plain, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # an integer of more than 64 bits
        return json.dumps(row, ensure_ascii=False, separators=(",", ":"), default=plain).encode() + b"\n"
