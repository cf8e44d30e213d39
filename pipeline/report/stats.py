"""The statistics of the report. They are small sums that can be merged. Finalize adds one part of the output at a time.

An answer that serves several rows of a job is counted once. The memory does not grow with the number of rows.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.report.value_stats import Show, Shown, ValueStats, lowest
from pipeline.report.vector_stats import VectorStats

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# The bins of a histogram: `PER_OCTAVE` bins for a factor of two (each 2.2% wide), from 0.1 ms to 97 days, or to 8 million
# tokens.
PER_OCTAVE, LOW, OCTAVES = 32, 2.0**-13, 36
BINS = 1 + PER_OCTAVE * OCTAVES  # the first bin holds smaller values
# The buckets of the timeline start at 250 ms. Their width doubles while there are more than `MOST_BUCKETS`.
FIRST_WIDTH_MS, MOST_BUCKETS = 250, 240
# In the timeline, this many bins of latency are combined into one.
COARSE = 8
# A longer time without any request in flight is a pause, such as between two runs. It is longer than waits for limits per
# minute, which are not pauses.
PAUSE_MS = 60_000
# The number of rows shown, of each kind.
SAMPLED, FAILED, SLOWEST, EXAMPLES = 40, 15, 10, 4


def bin_of(values: Floats) -> Ints:
    with np.errstate(divide="ignore"):
        at = np.floor(np.log2(values / LOW) * PER_OCTAVE) + 1
    return np.clip(at, 0, BINS - 1).astype(np.int64)


def lower_edge(bins: Any) -> Any:
    """The lower edge of a bin. The first bin begins at zero."""
    return np.where(np.asarray(bins) <= 0, 0.0, LOW * 2.0 ** ((np.asarray(bins) - 1) / PER_OCTAVE))


@dataclass(slots=True)
class Histogram:
    """Counts in bins of equal ratio, with the exact minimum, maximum and sum."""

    counts: Ints = field(default_factory=lambda: np.zeros(BINS, np.int64))
    least: float = np.inf
    most: float = -np.inf
    sum: float = 0.0

    def add(self, values: Floats) -> None:
        if len(values):
            self.counts += np.bincount(bin_of(values), minlength=BINS)
            self.least, self.most = min(self.least, float(values.min())), max(self.most, float(values.max()))
            self.sum += float(values.sum())

    def merge(self, other: Histogram) -> None:
        self.counts += other.counts
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.sum += other.sum

    def __len__(self) -> int:
        return int(self.counts.sum())

    def quantile(self, q: float) -> float:
        """A quantile, accurate to the width of a bin. 0 if nothing was counted."""
        if not len(self):
            return 0.0
        return float(np.clip(quantile_of(self.counts, np.arange(BINS), q), self.least, self.most))


def quantile_of(counts: Ints, bins: Ints, q: float, size: int = 1) -> float:
    """A quantile. Assumes that the values of a bin are spread evenly. Each of `bins` consists of `size` finest bins."""
    total = np.cumsum(counts)
    rank = q * (total[-1] - 1)
    at = int(np.searchsorted(total, rank, side="right"))
    before = total[at] - counts[at]
    low, high = lower_edge(bins[at] * size), lower_edge((bins[at] + 1) * size)
    return float(low + (high - low) * (rank - before + 0.5) / counts[at])


SUMS = ("answered", "failed", "input", "output")
_CELLS = pa.schema([(name, pa.int64()) for name in ("bucket", "latency", *SUMS)])


@dataclass(slots=True)
class Timeline:
    """Answers over time: sums for each bucket of time and, within a bucket, for each bin of latency."""

    width_ms: int = FIRST_WIDTH_MS
    cells: pa.Table = field(default_factory=_CELLS.empty_table)
    # The intervals in which a request was in flight: (start, end) in ms since the epoch, with more than `PAUSE_MS` between.
    active_intervals: Ints = field(default_factory=lambda: np.empty((0, 2), np.int64))

    def add(self, done_ms: Ints, latency_s: Floats, sums: Sequence[Ints]) -> None:
        """Adds answers. `done_ms`: ms since the epoch; `sums`: an array for each of `SUMS`. All arrays have one length."""
        columns = [done_ms // self.width_ms, bin_of(latency_s) // COARSE, *sums]
        new = pa.table([pa.array(column, pa.int64()) for column in columns], schema=_CELLS)
        began = done_ms - np.ceil(latency_s * 1000).astype(np.int64)
        self._take(new, np.stack([began, done_ms], axis=1))

    def merge(self, other: Timeline) -> None:
        while self.width_ms < other.width_ms:
            self.widen()
        self._take(_rebucketed(other.cells, self.width_ms // other.width_ms), other.active_intervals)

    def _take(self, cells: pa.Table, active_intervals: Ints) -> None:
        self.cells = _summed(pa.concat_tables([self.cells, cells]))
        while pc.count_distinct(self.cells["bucket"]).as_py() > MOST_BUCKETS:
            self.widen()
        self.active_intervals = _merged(np.concatenate([self.active_intervals, active_intervals]))

    def widen(self) -> None:
        """Makes the buckets twice as wide."""
        self.width_ms *= 2
        self.cells = _summed(_rebucketed(self.cells, 2))

    @property
    def seconds(self) -> float:
        """The total length of the active intervals in seconds, without pauses."""
        return float((self.active_intervals[:, 1] - self.active_intervals[:, 0]).sum()) / 1000


def _rebucketed(cells: pa.Table, by: int) -> pa.Table:
    return cells.set_column(0, "bucket", pa.array(np.asarray(cells["bucket"]) // by))


def _summed(cells: pa.Table) -> pa.Table:
    sums = cells.group_by(["bucket", "latency"]).aggregate([(name, "sum") for name in SUMS])
    return pa.table([sums["bucket"], sums["latency"], *(sums[f"{name}_sum"] for name in SUMS)], schema=_CELLS)


def _merged(spans: Ints) -> Ints:
    """The union of spans. Spans that are at most `PAUSE_MS` apart become one."""
    if not len(spans):
        return spans
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    ends = np.maximum.accumulate(spans[:, 1])
    opens = np.concatenate([[True], spans[1:, 0] > ends[:-1] + PAUSE_MS])
    first = np.flatnonzero(opens)
    return np.stack([spans[first, 0], ends[np.append(first[1:], len(spans)) - 1]], axis=1)


def _located(rows: Ints, index: int, show: Show, at: int) -> Shown:
    """The row at this position of `rows`, for the report."""
    return Shown(0, index + int(rows[at]), show(int(rows[at])))


class Example(NamedTuple):
    """An example of a failed row."""

    at: int  # index of the row
    id: str
    message: str


@dataclass(slots=True)
class Stats:
    """The statistics of a part of the output, or of the whole output."""

    answers: int = 0  # a sum over jobs: an answer that serves rows of two jobs counts twice
    latency: Histogram = field(default_factory=Histogram)  # of the answers alone
    queued: Histogram = field(default_factory=Histogram)  # the time before the answers began
    input: Histogram = field(default_factory=Histogram)
    output: Histogram = field(default_factory=Histogram)
    timeline: Timeline = field(default_factory=Timeline)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    sample: list[Shown] = field(default_factory=list)  # spread evenly over the input
    failed: list[Shown] = field(default_factory=list)  # spread evenly over the failed rows
    slowest: list[Shown] = field(default_factory=list)
    columns: dict[str, ValueStats] = field(default_factory=dict)  # of the answers: counts of done rows
    vectors: VectorStats = field(default_factory=VectorStats)  # the embeddings
    finish: ValueStats = field(default_factory=lambda: ValueStats("label"))  # the finish reasons of done rows
    broken: str | None = None  # the traceback of a bug in this class

    def add(
        self, at: Ints, index: int, completions: pa.Table, done_at: Any, ids: Sequence[str], show: Show,
        columns: Mapping[str, pa.Array | pa.ChunkedArray] | None = None, rows_of: Mapping[str, Bools] | None = None,
    ) -> None:  # fmt: skip
        """Adds the rows of a part. `at` is the position of each row's answer in the ledger's index, or -1 if the row was
        never asked. `index` is the number of the first row. `show` prepares a row for the report. `columns` have values
        of the answers. `rows_of`: the rows that may have a value of a column, if not all of them may."""
        with self._contained():
            failed = np.asarray(completions["error"].is_valid())
            latency = np.asarray(completions["latency_s"].fill_null(0), np.float64)
            done_ms = np.asarray(done_at.cast(pa.int64()).fill_null(0), np.int64)
            usage = completions["usage"].combine_chunks()
            tokens = [np.asarray(pc.struct_field(usage, name).fill_null(0), np.int64) for name in ("input", "output")]
            first = np.zeros(len(at), np.bool_)  # the first row of each answer
            first[np.unique(at, return_index=True)[1]] = True
            first &= at >= 0

            good = first & ~failed
            self.answers += int(first.sum())
            self.input.add(tokens[0][good].astype(np.float64))
            self.output.add(tokens[1][good].astype(np.float64))
            self.latency.add(latency[good & (latency > 0)])
            waits = completions["queued_s"]
            self.queued.add(np.asarray(waits.fill_null(0), np.float64)[good & (latency > 0) & np.asarray(waits.is_valid())])
            timed = first & (latency > 0)  # answers of a provider's batch have no latency
            if timed.any():
                sums = (~failed).astype(np.int64), failed.astype(np.int64), *tokens
                self.timeline.add(done_ms[timed], latency[timed], [column[timed] for column in sums])

            rows = np.arange(len(at))
            # Multiples of the golden ratio: the k lowest ranks are spread evenly over the input, for any k and any division
            # into parts.
            spread = ((index + rows).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.float64)
            wanted = (
                (self.sample, SAMPLED, rows, spread),
                (self.failed, FAILED, rows[failed], spread[failed]),
                (self.slowest, SLOWEST, rows[timed], -latency[timed]),
            )
            for shown, limit, some, ranks in wanted:
                best = np.argsort(ranks, kind="stable")[:limit]
                found = [(float(ranks[n]), int(some[n])) for n in best if len(shown) < limit or ranks[n] < shown[-1].rank]
                shown[:] = lowest([*shown, *(Shown(rank, index + row, show(row)) for rank, row in found)], limit)
            for row, error in zip(rows[failed].tolist(), completions["error"].drop_null().to_pylist(), strict=True):
                examples = self.examples.setdefault(error["type"], [])
                if len(examples) < EXAMPLES:  # parts are added in order, so these are the first examples
                    examples.append(Example(index + row, ids[row], error["message"] or ""))
            may = rows_of or {}
            values = {name: (column, rows[~failed & may.get(name, True)]) for name, column in (columns or {}).items()}
            self._add_values(index, rows[~failed], spread, completions, show, values)
            if "embedding" in completions.column_names:
                vectors = completions["embedding"].combine_chunks()
                self.vectors.add(vectors, spread, first, partial(_located, rows, index, show))

    def _add_values(
        self, index: int, done: Ints, spread: Floats, completions: pa.Table, show: Show,
        columns: Mapping[str, tuple[Any, Ints]],
    ) -> None:  # fmt: skip
        """Counts the values of the done rows. `columns`: the values of each column, and the rows that may have one."""
        for name, (column, some) in [(None, (completions["finish_reason"], done)), *columns.items()]:
            column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            if name is None:
                found = self.finish
            elif (found := self.columns.get(name)) is None:  # type: ignore[assignment]
                found = self.columns[name] = ValueStats.of(column.type)
            found.add(
                column.take(pa.array(some)),
                spread[some],
                partial(_located, some, index, show),
            )

    def merge(self, other: Stats) -> None:
        with self._contained():
            self.answers += other.answers
            self.latency.merge(other.latency)
            self.queued.merge(other.queued)
            self.input.merge(other.input)
            self.output.merge(other.output)
            self.timeline.merge(other.timeline)
            for type, found in other.examples.items():
                self.examples[type] = lowest([*self.examples.get(type, ()), *found], EXAMPLES)
            self.sample = lowest([*self.sample, *other.sample], SAMPLED)
            self.failed = lowest([*self.failed, *other.failed], FAILED)
            self.slowest = lowest([*self.slowest, *other.slowest], SLOWEST)
            self.vectors.merge(other.vectors)
            self.finish.merge(other.finish)
            for name, values in other.columns.items():
                self.columns.setdefault(name, ValueStats(values.kind)).merge(values)
        self.broken = self.broken or other.broken

    @contextlib.contextmanager
    def _contained(self) -> Iterator[None]:
        """Keeps the traceback of a bug, so that the bug costs the report and not the run."""
        try:
            yield
        except Exception:
            self.broken = self.broken or traceback.format_exc()
