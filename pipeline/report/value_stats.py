"""The distribution of the values of one output column. Finalize adds one part of the output at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

T = TypeVar("T")
Floats = npt.NDArray[np.float64]

# The number of different values that are counted. Rows with other values are counted together.
MOST_VALUES = 1_000
# A text counts with this number of its first characters.
TEXT_CHARS = 200
# Examples are kept for this number of values, and this number for each of them.
EXAMPLE_VALUES, EXAMPLES = 16, 2
# The values of this many numbers are kept for the histogram: exact for fewer rows, else a sample.
SAMPLED_NUMBERS = 4_000
LOWEST, HIGHEST = "Lowest", "Highest"  # the keys of `ValueStats.examples` for numbers


class Shown(NamedTuple):
    """A row that the report shows. Rows with the lowest `rank` come first."""

    rank: float
    at: int  # index of the row
    row: dict[str, Any]


# Prepares the row of this number in a part for the report.
Show = Callable[[int], dict[str, Any]]
# The same, with the index of the row. The numbers are those of the column that is added.
Locate = Callable[[int], Shown]


@dataclass(slots=True)
class ValueStats:
    """Counts of the values, sums of numbers, and examples of rows. Two of them can be merged."""

    kind: str  # "number", "label", "labels" (a row has a list of them), or "other"
    rows: int = 0  # done rows
    missing: int = 0  # some of `rows`, without a value
    counts: Counter[Any] = field(default_factory=Counter)  # up to `MOST_VALUES` values
    uncounted: int = 0  # rows with a value that is not in `counts`
    least: float = math.inf
    most: float = -math.inf
    sum: float = 0.0
    ranks: Floats = field(default_factory=lambda: np.empty(0))  # of the sampled numbers, ascending
    numbers: Floats = field(default_factory=lambda: np.empty(0))
    examples: dict[Any, list[Shown]] = field(default_factory=dict)

    @classmethod
    def of(cls, type: pa.DataType) -> ValueStats:
        """Empty statistics of a column of this type."""
        if pa.types.is_list(type) and _kind(type.value_type) == "label":
            return cls("labels")
        return cls(_kind(type))

    @property
    def values(self) -> int:
        """The number of rows with a value."""
        return self.rows - self.missing

    def add(self, column: pa.Array, ranks: Floats, show: Locate) -> None:
        """Adds the values of done rows. `ranks` orders the examples."""
        rows = np.flatnonzero(np.asarray(column.is_valid()))
        self.rows += len(column)
        self.missing += len(column) - len(rows)
        if self.kind == "other" or not len(rows):
            return
        column = column.drop_null()
        if self.kind == "labels":
            rows = rows[np.asarray(pc.list_parent_indices(column), np.int64)]
            column = pc.list_flatten(column)
        if self.kind == "number":
            column = column.filter(pc.is_finite(column))
            if not len(column):
                return
            self._add_numbers(np.asarray(column.cast(pa.float64(), safe=False)), rows, ranks, show)
        else:
            column = pc.utf8_slice_codeunits(column.cast(pa.string()), 0, TEXT_CHARS)
        encoded = column.dictionary_encode()
        codes = np.asarray(encoded.indices)
        sizes = np.bincount(codes, minlength=len(encoded.dictionary))
        found = self._frequent(encoded.dictionary, sizes)
        self._count((value, int(sizes[code])) for code, value in found.items())
        self.uncounted += len(codes) - int(sizes[list(found)].sum())
        self._add_examples(found, sizes, codes, rows, ranks, show)

    def _frequent(self, values: pa.Array, sizes: Any) -> dict[int, Any]:
        """The values to count: all, or those that are counted already and the most frequent others."""
        kept = np.arange(len(values))
        if len(values) > 2 * MOST_VALUES:
            known = np.asarray(pc.is_in(values, value_set=pa.array(list(self.counts), values.type)))
            frequent = np.argsort(-sizes, kind="stable")[: MOST_VALUES + 1]
            kept = np.union1d(np.flatnonzero(known), frequent)
        return dict(zip(kept.tolist(), values.take(pa.array(kept)).to_pylist(), strict=True))

    def merge(self, other: ValueStats) -> None:
        self.rows += other.rows
        self.missing += other.missing
        self.uncounted += other.uncounted
        self._count(other.counts.items())
        self._sum(other.least, other.most, other.sum)
        self._sample(other.ranks, other.numbers)
        for value, shown in other.examples.items():
            if value in self.examples or len(self.examples) < EXAMPLE_VALUES:
                self.examples[value] = lowest([*self.examples.get(value, ()), *shown], EXAMPLES)

    def _count(self, found: Iterable[tuple[Any, int]]) -> None:
        for value, rows in sorted(found, key=lambda item: -item[1]):
            if value in self.counts or len(self.counts) < MOST_VALUES:
                self.counts[value] += rows
            else:
                self.uncounted += rows

    def _add_numbers(self, numbers: Floats, rows: Any, ranks: Floats, show: Locate) -> None:
        self._sum(float(numbers.min()), float(numbers.max()), float(numbers.sum()))
        self._sample(ranks[rows], numbers)
        for name, order in ((LOWEST, numbers), (HIGHEST, -numbers)):
            best = np.argsort(order, kind="stable")[:EXAMPLES]
            self._show(name, [(float(order[n]), int(rows[n])) for n in best], show)

    def _sum(self, least: float, most: float, sum: float) -> None:
        self.least, self.most, self.sum = min(self.least, least), max(self.most, most), self.sum + sum

    def _sample(self, ranks: Floats, numbers: Floats) -> None:
        ranks, numbers = np.concatenate([self.ranks, ranks]), np.concatenate([self.numbers, numbers])
        order = np.argsort(ranks, kind="stable")[:SAMPLED_NUMBERS]
        self.ranks, self.numbers = ranks[order], numbers[order]

    def _add_examples(self, found: dict[int, Any], sizes: Any, codes: Any, rows: Any, ranks: Floats, show: Locate) -> None:
        order = np.argsort(ranks[rows], kind="stable")
        known = [code for code, value in found.items() if value in self.examples]
        frequent = sorted(found.keys() - known, key=lambda code: -sizes[code])[
            : max(0, EXAMPLE_VALUES - len(self.examples))
        ]
        for code in [*known, *frequent]:
            mine = rows[order[codes[order] == code][:EXAMPLES]]
            self._show(found[code], [(float(ranks[row]), int(row)) for row in mine], show)

    def _show(self, value: Any, ranked: list[tuple[float, int]], show: Locate) -> None:
        shown = self.examples.setdefault(value, [])
        found = [(rank, row) for rank, row in ranked if len(shown) < EXAMPLES or rank < shown[-1].rank]
        shown[:] = lowest([*shown, *(show(row)._replace(rank=rank) for rank, row in found)], EXAMPLES)


def _kind(type: pa.DataType) -> str:
    if pa.types.is_integer(type) or pa.types.is_floating(type):
        return "number"
    return "label" if pa.types.is_string(type) or pa.types.is_boolean(type) else "other"


def lowest(items: Iterable[T], limit: int) -> list[T]:
    """The first `limit` items by their first two fields."""
    return sorted(items, key=lambda item: item[:2])[:limit]  # type: ignore[index]
