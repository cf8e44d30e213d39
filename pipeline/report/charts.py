"""Charts as inline SVG. The page's style sheet colours their shapes by class, in light and in dark mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow.compute as pc
from markupsafe import Markup

from pipeline.report.stats import COARSE, SUMS, Floats, Histogram, Timeline, lower_edge, quantile_of

# The size of a drawing in user units. It is close to its size in pixels on a page, so that text is not scaled.
WIDTH, HEIGHT = 360, 168
LEFT, RIGHT, TOP, BOTTOM = 48, 6, 12, 22
LETTER = 7  # the largest mean width of a label's letters, in user units
BARS = 30
COLUMNS = 72
# At most this many active intervals are drawn apart. The shortest pauses beyond them are drawn as idle time.
MAX_INTERVALS = 8
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def number(value: float) -> str:
    """About three significant digits: 0.42, 12.3, 1,234, 5.6 M."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2g}"


def short(value: float) -> str:
    """A number for an axis label of at most six characters: 12k, not 12,000."""
    return f"{value / 1000:.3g}k" if 10_000 <= abs(value) < 1e6 else number(value)


def seconds(value: float) -> str:
    """A duration with its unit: 12 ms, 3.4 s, 5 min 20 s, 2 h 5 min, 3 d 4 h."""
    if value < 0.9995:
        return f"{value * 1000:.3g} ms" if value else "0 s"
    if value < 59.95:
        return f"{value:.3g} s"
    for size, unit, small, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        whole, rest = divmod(round(value / small), size // small)
        if whole:
            return f"{whole} {unit} {rest} {part}" if rest else f"{whole} {unit}"
    return f"{value:.0f} s"


def short_seconds(value: float) -> str:
    """A duration for an axis label: 200 s, not 3 min 20 s."""
    return f"{short(value)} s" if value >= 1 else seconds(value)


def clock(ms: float) -> str:
    """The date and time in UTC of a time in ms since the epoch."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def ticks(low: float, high: float, limit: int) -> list[float]:
    """About `limit` round numbers from `low` to `high`."""
    if high <= low:
        return [low]
    raw = (high - low) / limit
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * by for by in (1, 2, 5, 10) if size * by >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def time_ticks(high: float, limit: int = 5) -> list[float]:
    """About `limit` times in seconds from zero to `high`, at round steps of a clock."""
    if high < 4:
        return ticks(0, high, limit)
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200)
    days = 86400 * math.ceil(high / 86400 / limit)
    step = next((step for step in steps if high / step <= limit), days)
    return [float(n * step) for n in range(int(high / step) + 1)]


@dataclass(frozen=True, slots=True)
class Drawing:
    """An SVG drawing under construction, with a horizontal axis from `low` to `high`."""

    parts: list[str]
    low: float
    high: float
    top: float  # the value at the upper end of the vertical axis
    left: float = LEFT

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(1.0, value / (self.top or 1.0)), 1)

    def x(self, value: float) -> float:
        return round(self.left + (WIDTH - self.left - RIGHT) * (value - self.low) / ((self.high - self.low) or 1.0), 1)

    def scale_y(self, text: Callable[[float], str] = short) -> None:
        for value in ticks(0, self.top, 4):
            y = self.y(value)
            self.parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            self.parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4}">{text(value)}</text>')

    def mark_x(self, value: float, text: str) -> None:
        x = self.x(value)
        self.parts.append(f'<line class="tick" x1="{x}" x2="{x}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>')
        half = LETTER * len(text) / 2
        where, at = ("start", 1.0) if x < half + 1 else ("end", WIDTH - 1.0) if x > WIDTH - 1 - half else ("mid", x)
        self.parts.append(f'<text class="{where}" x="{at}" y="{HEIGHT - 6}">{text}</text>')

    def bar(self, kind: str, start: float, end: float, low: float, high: float, gap: float = 1) -> None:
        left, right, y0, y1 = self.x(start), self.x(end), self.y(low), self.y(high)
        width = max(0.6, right - left - gap)
        if y0 > y1:
            self.parts.append(f'<rect class="{kind}" x="{left}" y="{y1}" width="{width:.1f}" height="{y0 - y1:.1f}"/>')

    def hover(self, start: float, end: float, text: str) -> None:
        """Adds a tooltip over this part of the horizontal axis."""
        left, right = self.x(start), self.x(end)
        size = f'x="{left}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        self.parts.append(f'<rect class="hover" {size}><title>{text}</title></rect>')

    def done(self, label: str) -> Markup:
        y = HEIGHT - BOTTOM
        axis = f'<line class="axis" x1="{self.left}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        drawn = "".join([*self.parts, axis])
        return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{drawn}</svg>')


# -- over time --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TimeColumn:
    """A bucket of time, or the part of a bucket in which a request was in flight."""

    at: float  # seconds on the axis
    seconds: float
    start_ms: int
    rate_s: float  # divisor of rates: `seconds`, but at least a quarter of a bucket, as a short part gives no useful rate
    answered: int
    failed: int
    input: int
    output: int
    p50: float
    p95: float

    @property
    def end(self) -> float:
        return self.at + self.seconds

    @property
    def rows(self) -> int:
        return self.answered + self.failed

    @property
    def when(self) -> str:
        return f"{clock(self.start_ms)}, {seconds(self.seconds)}"


@dataclass(frozen=True, slots=True)
class Series:
    """The timeline as columns on one axis of seconds. The axis leaves pauses out."""

    columns: list[TimeColumn]
    breaks: list[tuple[float, float, float]]  # start and end on the axis, and the length of the pause in seconds
    end: float


def series_of(timeline: Timeline) -> Series:
    """Widens the timeline's buckets until they are few enough to draw."""
    active_intervals = timeline.active_intervals
    while len(active_intervals) > MAX_INTERVALS:  # draw the shortest pause as idle time
        active_intervals = _merged(active_intervals, np.argmin(active_intervals[1:, 0] - active_intervals[:-1, 1]))
    rows = sum(pc.sum(timeline.cells[name]).as_py() for name in ("answered", "failed"))
    limit = len(active_intervals) + max(12, min(COLUMNS, rows // 2))
    while (
        sum(end // timeline.width_ms - start // timeline.width_ms + 1 for start, end in active_intervals.tolist()) > limit
    ):
        timeline.widen()
    width = timeline.width_ms
    # The rows of a bucket belong to one column, so a pause within a bucket is drawn as idle time.
    active_intervals = _merged(
        active_intervals, np.flatnonzero(active_intervals[1:, 0] // width == active_intervals[:-1, 1] // width)
    )
    cells = timeline.cells.sort_by([("bucket", "ascending"), ("latency", "ascending")])
    bucket, latency = np.asarray(cells["bucket"]), np.asarray(cells["latency"])
    sums = np.stack([np.asarray(cells[name]) for name in SUMS], axis=1)
    gap = float((active_intervals[:, 1] - active_intervals[:, 0]).sum()) / 1000 * 0.03
    columns: list[TimeColumn] = []
    breaks: list[tuple[float, float, float]] = []
    at, before = 0.0, 0.0
    for start, end in active_intervals.tolist():
        if columns:
            breaks.append((at, at + gap, (start - before) / 1000))
            at += gap
        for slot in range(start // width, end // width + 1):
            part = slice(*np.searchsorted(bucket, [slot, slot + 1]))
            since, until = max(start, slot * width), min(end, (slot + 1) * width)
            counts = sums[part, :2].sum(axis=1)
            p50, p95 = (quantile_of(counts, latency[part], q, COARSE) if len(counts) else 0.0 for q in (0.5, 0.95))
            span, rate_s = (until - since) / 1000, max(until - since, width / 4) / 1000
            answered, failed, read, written = sums[part].sum(axis=0).tolist()
            columns.append(TimeColumn(at, span, since, rate_s, answered, failed, read, written, p50, p95))
            at += span
        before = end
    return Series(columns, breaks, at)


def _merged(active_intervals: np.ndarray, pauses: Any) -> np.ndarray:
    """The active intervals without the pauses of these numbers: the intervals on both sides become one."""
    return np.delete(active_intervals.ravel(), np.concatenate([2 * np.atleast_1d(pauses) + at for at in (1, 2)])).reshape(
        -1, 2
    )


def _over_time(series: Series, top: float, scale: Callable[[float], str] = short) -> Drawing:
    drawing = Drawing([], 0, series.end, top)
    drawing.scale_y(scale)
    pauses = 0.0
    for value in time_ticks(series.end - sum(end - start for start, end, _ in series.breaks)):
        pauses = sum(end - start for start, end, _ in series.breaks if start <= value + pauses)
        drawing.mark_x(value + pauses, seconds(value))
    for start, end, pause in series.breaks:
        drawing.bar("pause", start, end, 0, top, 0)
        drawing.hover(start, end, f"a pause of {seconds(pause)}")
    return drawing


def rows_over_time(series: Series) -> Markup:
    top = max(column.rows / column.rate_s for column in series.columns) * 1.08
    drawing = _over_time(series, top)
    for c in series.columns:
        answered, failed = c.answered / c.rate_s, c.failed / c.rate_s
        drawing.bar("answered", c.at, c.end, 0, answered)
        drawing.bar("failed", c.at, c.end, answered, answered + failed)
        also = f", {c.failed:,} failed" if c.failed else ""
        drawing.hover(c.at, c.end, f"{c.when}: {c.answered:,} done{also}; {number(answered + failed)} a second")
    return drawing.done("Answers per second over time")


def tokens_over_time(series: Series) -> Markup:
    top = max(1e-9, *(column.output / column.rate_s for column in series.columns)) * 1.08
    drawing = _over_time(series, top)
    for c in series.columns:
        drawing.bar("tokens", c.at, c.end, 0, c.output / c.rate_s)
        text = f"{c.output:,} output tokens, {number(c.output / c.rate_s)} a second; {c.input:,} input tokens"
        drawing.hover(c.at, c.end, f"{c.when}: {text}")
    return drawing.done("Output tokens per second over time")


def latency_over_time(series: Series) -> Markup:
    top = max(column.p95 for column in series.columns) * 1.08
    drawing = _over_time(series, top, short_seconds)
    full = [c for c in series.columns if c.rows]
    # The line is interrupted by columns without rows and by pauses.
    ends = [n for n in range(1, len(full)) if full[n].at - full[n - 1].end >= 1e-6]
    for start, end in pairwise([0, *ends, len(full)]):
        run = full[start:end]
        middles = [drawing.x((c.at + c.end) / 2) for c in run]
        p50, p95 = [drawing.y(c.p50) for c in run], [drawing.y(c.p95) for c in run]
        if len(run) == 1:  # a line needs two points
            middles, p50, p95 = [drawing.x(run[0].at), drawing.x(run[0].end)], p50 * 2, p95 * 2
        upper = " ".join(f"{x},{y}" for x, y in zip(middles, p95, strict=True))
        lower = [f"{x},{y}" for x, y in zip(middles, p50, strict=True)]
        drawing.parts.append(f'<polygon class="band" points="{upper} {" ".join(reversed(lower))}"/>')
        drawing.parts.append(f'<polyline class="p95" points="{upper}"/>')
        drawing.parts.append(f'<polyline class="p50" points="{" ".join(lower)}"/>')
    for c in full:
        drawing.hover(c.at, c.end, f"{c.when}: p50 {seconds(c.p50)}, p95 {seconds(c.p95)}")
    return drawing.done("Latency over time")


# -- distributions ----------------------------------------------------------------------------------------------------


def histogram(found: Histogram, label: str, whole: bool) -> Markup:
    """A histogram. Its axis is logarithmic if the values span a wide range. `whole`: the values are integers."""
    least, most = found.least, found.most
    bars = min(BARS, max(10, round(3 * math.sqrt(len(found)))))  # with more bars, few values would leave gaps
    long = most > 20 * max(found.quantile(0.05), 1.0 if whole else 1e-4)
    forth, back = _SCALES[(1 + whole) * long]
    ends = np.array([least, most + 1]) if whole else np.array([least * 0.98, most * 1.02])
    if ends[1] - ends[0] < (6 if whole else 0):
        ends = np.array([max(0, least - 3), most + 4])
    if whole and not long:
        step = max(1, math.ceil((ends[1] - ends[0]) / bars))
        edges = np.arange(ends[0], ends[1] + step, step)
    else:
        ends = np.maximum(ends, 0 if whole else 1e-5)
        if ends[0] == ends[1]:  # all values are equal, and below the lower end of the axis
            ends[1] *= 2
        low, high = forth(ends).tolist()
        edges = back(np.linspace(low, high, bars + 1))
        edges = np.unique(np.round(edges)) if whole else edges
    counts = _rebinned(found, edges, whole)
    places = forth(edges)
    heights = counts / np.diff(places)
    drawing = Drawing([], float(places[0]), float(places[-1]), float(heights.max()) * 1.3, RIGHT)
    marks = _log_ticks(edges[0], edges[-1]) if long else ticks(edges[0], edges[-1], 5)
    shown = short if whole else seconds
    middle = 0.5 if whole else 0.0  # an integer n is drawn from n to n + 1
    for value in marks:
        if (not whole or value == round(value)) and edges[0] <= value < edges[-1]:
            drawing.mark_x(float(forth(value + middle)), shown(value))
    total = max(1, len(found))
    for start, end, height, count in zip(edges[:-1], edges[1:], heights, counts, strict=True):
        drawing.bar("counted", float(forth(start)), float(forth(end)), 0, float(height))
        if count >= 0.5:
            span = _span(start, end, whole)
            drawing.hover(float(forth(start)), float(forth(end)), f"{span}: {count:,.0f} ({count / total:.1%})")
    row, last = 0, -math.inf
    for name, q in QUANTILES.items():
        x = drawing.x(float(forth(found.quantile(q) + middle)))
        side, at = ("end", x - 3) if x > WIDTH - 40 else ("start", x + 3)
        row = row + 1 if x - last < (48 if side == "end" else 26) else 0
        last = x
        drawing.parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP + 11 * row}" y2="{HEIGHT - BOTTOM}"/>')
        drawing.parts.append(f'<text class="{side} name" x="{at:.1f}" y="{TOP + 11 * row + 6}">{name}</text>')
    return drawing.done(label)


def figures(found: Histogram, whole: bool) -> list[tuple[str, str]]:
    """(name, text) of the figures under a histogram."""
    shown = number if whole else seconds
    values = {"min": found.least, **{name: found.quantile(q) for name, q in QUANTILES.items()}, "max": found.most}
    return [(name, shown(round(value) if whole else value)) for name, value in values.items()]


# The scale of an axis and its inverse: linear; logarithmic; logarithmic for integers, which include 0.
_SCALES: list[tuple[Callable[[Any], Any], Callable[[Any], Any]]] = [
    (np.asarray, np.asarray),
    (np.log, np.exp),
    (np.log1p, np.expm1),
]


def _span(start: float, end: float, whole: bool) -> str:
    if not whole:
        return f"{seconds(start)} to {seconds(end)}"
    return number(start) if end - start <= 1 else f"{start:,.0f} to {end - 1:,.0f}"


def _log_ticks(low: float, high: float) -> list[float]:
    start = math.floor(math.log10(max(low, 1e-6)))
    found = [by * 10.0**power for power in range(start, math.ceil(math.log10(high)) + 1) for by in (1, 2, 5)]
    found = [value for value in found if low <= value <= high]
    return found if len(found) <= 7 else [v for v in found if f"{v:e}".startswith("1")]


def _rebinned(found: Histogram, edges: Floats, whole: bool) -> Floats:
    """The counts between other edges. Assumes that the values of a bin are spread evenly over it, or over its integers."""
    bins = np.flatnonzero(found.counts)
    low, high = lower_edge(bins), lower_edge(bins + 1)
    if whole:  # an integer n covers the range from n to n + 1
        low, high = np.ceil(low), np.maximum(np.ceil(high), np.ceil(low) + 1)
    low = np.maximum(low, found.least)
    high = np.minimum(high, found.most + 1 if whole else np.nextafter(found.most, np.inf))
    high = np.maximum(high, low + (1 if whole else 1e-9))
    counts = np.zeros(len(edges) - 1)
    for start, end, count in zip(low, high, found.counts[bins], strict=True):
        overlap = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
        counts += count * np.maximum(overlap, 0) / (end - start)
    return counts
