"""Charts and rows of the distribution of one output column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from engines.text import counted
from pipeline.report.charts import BARS, RIGHT, Drawing, number, short, ticks
from pipeline.report.value_stats import HIGHEST, LOWEST, Shown, ValueStats
from pipeline.report.vector_stats import Pair, VectorStats

# This many values have a line of their own. More numbers become a histogram.
LINES, NUMBER_LINES = 12, 15


@dataclass(frozen=True, slots=True)
class ValueLine:
    """A value with the number of its rows."""

    value: str
    rows: int
    share: float  # of the rows with a value
    examples: list[Shown]


@dataclass(frozen=True, slots=True)
class Column:
    """One column on the page."""

    name: str
    found: ValueStats
    lines: list[ValueLine]
    others: int  # rows whose value has no line
    free_text: bool
    figures: list[tuple[str, str]]  # of numbers
    chart: Markup | None  # a histogram of numbers
    extremes: list[tuple[str, list[Shown]]]  # rows with the lowest and highest numbers

    @classmethod
    def of(cls, name: str, found: ValueStats) -> Column:
        lines = value_lines(found)
        is_number = found.kind == "number" and len(found.numbers) > 0
        many = is_number and not lines
        return cls(
            name, found, lines, other_values(found), is_free_text(found), number_figures(found) if is_number else [],
            number_histogram(found, name) if many else None, extremes(found) if many else [],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The embeddings on the page."""

    lengths: str
    norms: Column
    cosines: Column  # of the pairs of the sample
    pairs: list[tuple[str, list[Pair]]]

    @classmethod
    def of(cls, found: VectorStats) -> Embeddings:
        cosines, nearest, farthest = found.pairs()
        values = ValueStats("number")
        values.add(pa.array(cosines), np.arange(len(cosines), dtype=np.float64), lambda _: Shown(0, 0, {}))
        values.examples.clear()
        norms = Column.of("Norms of the embeddings", found.norms)
        pairs = [("Nearest pairs", nearest), ("Farthest pairs", farthest)] if nearest else []
        lengths = ", ".join(f"{length:,}" for length in sorted(found.lengths))
        title = f"Cosines of the pairs of {counted(len(found.sample), 'embedding')}, spread evenly over the input"
        return cls(lengths, norms, Column.of(title, values), pairs)


def is_free_text(found: ValueStats) -> bool:
    """True for several texts of which none occurs twice among those that are counted."""
    return found.kind == "label" and found.values > 1 and max(found.counts.values(), default=0) == 1


def value_lines(found: ValueStats) -> list[ValueLine]:
    """The lines of the most frequent values; for few different numbers, all of them in their order. Empty if the values
    are shown in another way."""
    if found.kind == "number":
        if len(found.counts) > NUMBER_LINES or found.uncounted:
            return []
        counts = sorted(found.counts.items())
    else:
        counts = [] if is_free_text(found) else found.counts.most_common(LINES)
    return [
        ValueLine(_text(value), rows, rows / max(1, found.values), found.examples.get(value, [])) for value, rows in counts
    ]


def other_values(found: ValueStats) -> int:
    """The number of rows whose value has no line."""
    if found.kind == "number" or is_free_text(found):
        return 0
    return found.uncounted + found.counts.total() - sum(rows for _, rows in found.counts.most_common(LINES))


def extremes(found: ValueStats) -> list[tuple[str, list[Shown]]]:
    """The rows with the lowest and the highest numbers."""
    return [(name, found.examples[name]) for name in (LOWEST, HIGHEST) if name in found.examples]


def number_figures(found: ValueStats) -> list[tuple[str, str]]:
    """(name, text) of the figures of numbers. The median is that of the sampled numbers."""
    count = found.counts.total() + found.uncounted
    values = {"min": found.least, "mean": found.sum / count, "median": float(np.median(found.numbers)), "max": found.most}
    return [(name, precise(value)) for name, value in values.items()]


def precise(value: float) -> str:
    """A number with up to four significant digits. Large integers have all of theirs."""
    if value == round(value) and abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 1e6 else number(value)


def number_histogram(found: ValueStats, label: str) -> Markup:
    """A histogram of the sampled numbers."""
    values = found.numbers
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, BARS, (low, high))
    drawing = Drawing([], low, high, float(counts.max()) * 1.15, RIGHT)
    for value in ticks(low, high, 5):
        drawing.mark_x(value, _tick(value))
    for start, end, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True):
        drawing.bar("counted", start, end, 0, count)
        if count:
            drawing.hover(start, end, f"{precise(start)} to {precise(end)}: {count / len(values):.1%}")
    middle = drawing.x(float(np.median(values)))
    drawing.parts.append(f'<line class="mark" x1="{middle}" x2="{middle}" y1="12" y2="146"/>')
    figures = ", ".join(f"{name} {text}" for name, text in number_figures(found))
    return drawing.done(f"{label}: {figures}")


def _tick(value: float) -> str:
    value = round(value, 12)
    return short(value) if value == round(value) else f"{value:.6g}"


def _text(value: Any) -> str:
    return precise(value) if isinstance(value, (int, float)) else str(value)
