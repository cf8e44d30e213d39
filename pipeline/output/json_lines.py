"""Tables as JSON lines: JSON text becomes JSON again, and the input's own values are written unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from engines.tasks import CHAT
from pipeline.dataset.arrow_rows import readable_rows, readable_values
from pipeline.output.jsonl_styles import Style
from pipeline.output.plan import OutputColumns
from pipeline.output.tables import error_names
from pipeline.storage.exact_json import dumps, loads

# Columns of Eagleray that hold JSON text in Parquet.
JSON_TEXT = ("messages", "tool_calls", "choices", "logprobs")


def data_lines(
    table: pa.Table, values: Sequence[Mapping[str, Any]], columns: OutputColumns, style: Style, tasks: Sequence[str] = ()
) -> bytes:
    """Lines of data/. `values`: the rows' columns as they are in the input. `tasks`: those of the rows, if the style needs
    them."""
    own = {c.name: c.source for c in columns.own if c.name is not None}
    in_json = {*JSON_TEXT, *(c.name for c in columns.answers if c.type is None)}

    def column(name: str) -> list[Any]:
        if name in own:
            return [row.get(own[name]) for row in values]
        found = readable_values(table[name])
        return list(map(_embedded, found)) if name in in_json else found

    lines = []
    for at, cells in enumerate(zip(*map(column, table.column_names), strict=True)):
        row = dict(zip(table.column_names, cells, strict=True))
        lines.append(dumps(style(row, tasks[at] if tasks else CHAT, values[at])) + b"\n")
    return b"".join(lines)


def error_lines(table: pa.Table, columns: OutputColumns) -> bytes:
    """Lines of errors/."""
    names = error_names([c.source for c in columns.own])
    in_json = {*JSON_TEXT, *(names[c.source] for c in columns.own if c.type is None)}
    lines = []
    for row in readable_rows(table):
        line = {name: _embedded(value) if name in in_json else value for name, value in row.items()}
        lines.append(dumps(line) + b"\n")
    return b"".join(lines)


def _embedded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return loads(value.encode())
    except ValueError:  # the input's own column of that name holds other text
        return value
