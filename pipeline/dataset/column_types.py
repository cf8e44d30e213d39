"""The columns that pass through: their types, and new names. Types are determined over the whole input, so that all output
files have one schema."""

from __future__ import annotations

import functools
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.exact_json import dumps

# The kinds of values in a JSON column, as bits.
BOOL, SMALL_INT, INT, FLOAT, TEXT, OTHER = 1, 2, 4, 8, 16, 32

_KIND = {type(None): 0, bool: BOOL, float: FLOAT, str: TEXT}
_EXACT_IN_FLOAT = 1 << 53
_INT64 = 1 << 63


def kind_of(value: Any) -> int:
    """The bit of a value's kind; 0 for null."""
    kind = _KIND.get(type(value))
    if kind is not None:
        return kind
    if type(value) is int:
        if -_EXACT_IN_FLOAT <= value <= _EXACT_IN_FLOAT:
            return SMALL_INT
        return INT if -_INT64 <= value < _INT64 else OTHER
    return OTHER


def type_of(kinds: int) -> pa.DataType | None:
    """The Arrow type that holds values of all these kinds exactly. None if only JSON text does."""
    if kinds == 0 or kinds == TEXT:
        return pa.string()
    if kinds == BOOL:
        return pa.bool_()
    if not kinds & ~(SMALL_INT | INT):
        return pa.int64()
    if not kinds & ~(SMALL_INT | FLOAT):
        return pa.float64()
    return None


@dataclass(slots=True)
class ColumnKinds:
    """The kinds of values in each column. The columns are in the order of their first appearance."""

    bits: dict[str, int] = field(default_factory=dict)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for name in dict.fromkeys(chain.from_iterable(rows)):
            values = [row.get(name) for row in rows]
            kinds = self.bits.get(name, 0)
            for found in set(map(type, values)):
                if (kind := _KIND.get(found)) is None:  # it depends on the value
                    for value in values:
                        kinds |= kind_of(value)
                    break
                kinds |= kind
            self.bits[name] = kinds

    def merge(self, other: ColumnKinds) -> None:
        for name, kinds in other.bits.items():
            self.bits[name] = self.bits.get(name, 0) | kinds


def to_array(values: Sequence[Any], type: pa.DataType | None) -> pa.Array:
    """An array of `type`. If `type` is None, every value that is not null becomes JSON text."""
    if type is None:
        return pa.array([None if value is None else dumps(value).decode() for value in values], pa.string())
    return pa.array(values, type, from_pandas=False)


@functools.cache
def stored_type(type: pa.DataType) -> pa.DataType | None:
    """The type of a column with this type in a Parquet file. None, which means JSON text, if Parquet has no such type:
    unions, calendar intervals, run-end encoding and structs without fields."""
    try:
        pq.write_table(pa.table({"": pa.nulls(1, type)}), io.BytesIO())
    except pa.ArrowException:
        return None
    return type


def common_type(a: pa.DataType | None, b: pa.DataType | None) -> pa.DataType | None:
    """A type that holds every value of both types exactly. None means JSON text."""
    if a is None or b is None or a == b:
        return a if a == b else None
    if pa.types.is_null(a) or pa.types.is_null(b):
        return b if pa.types.is_null(a) else a
    if pa.types.is_integer(a) and pa.types.is_integer(b) and pa.uint64() not in (a, b):
        return pa.int64()
    if {a, b} == {pa.float32(), pa.float64()}:
        return pa.float64()
    if {a, b} == {pa.string(), pa.large_string()}:
        return pa.large_string()
    return None


def input_name(name: str, taken: Collection[str]) -> str:
    """The name in the output of an input column whose own name has another meaning there: `input_<name>`, which must not be
    in `taken`."""
    renamed = f"input_{name}"
    while renamed in taken:
        renamed = f"input_{renamed}"
    return renamed
