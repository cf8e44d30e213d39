"""The values of tasks other than a chat, for people: as text, and as columns of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.storage.ledger import VALUE_COLUMNS

# The numbers of an embedding, and the items of other lists, that a text shows.
NUMBERS, ITEMS = 4, 8


def values_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The values of tasks in a row of the ledger or of the output."""
    return {name: row[name] for name in VALUE_COLUMNS if row.get(name) is not None}


def values_text(values: Mapping[str, Any]) -> str:
    """The values in words, one a line."""
    return "\n".join(f"{name}: {_words(value)}" for name, value in values.items())


def _words(value: Any) -> str:
    if not isinstance(value, list):
        return _number(value) if isinstance(value, float) else str(value)
    if value and isinstance(value[0], Mapping):
        return _several([" ".join(map(_words, item.values())) for item in value], ITEMS)
    return f"{len(value):,} numbers: {_several(list(map(_words, value[:NUMBERS])), NUMBERS, len(value))}"


def _several(words: list[str], limit: int, count: int | None = None) -> str:
    return ", ".join(words[:limit]) + (", …" if (count or len(words)) > limit else "")


def _number(value: float) -> str:
    return f"{value:.4g}"


def report_columns(completions: pa.Table) -> Iterator[tuple[str, str, pa.ChunkedArray]]:
    """(column of the values, name in the report, numbers or labels) for the columns that have a distribution."""
    for name, kind in VALUE_COLUMNS.items():
        if name not in completions.column_names:
            continue
        if not pa.types.is_nested(kind):
            yield name, name, completions[name]
        elif name == "ranking":
            best = pc.list_element(completions[name].combine_chunks(), 0) if _all_filled(completions[name]) else None
            if best is not None:
                yield name, "ranking: the best score", pa.chunked_array([pc.struct_field(best, "score")])


def _all_filled(lists: pa.ChunkedArray) -> bool:
    """True if no list is empty: `list_element` raises for one."""
    return bool(pc.min(pc.fill_null(pc.list_value_length(lists), 1)).as_py())
