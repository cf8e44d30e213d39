"""What the report tells, as small sums that merge: made where finalize reads the segments, a part of the output at a time.

Answers are counted once, however many rows of a job they serve. Nothing here grows with the number of rows.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

T = TypeVar("T")
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Bins of a histogram: so many to a factor of two (2.2% wide), from 0.1 ms to 97 days, or 8 million tokens.
PER_OCTAVE, LOW, OCTAVES = 32, 2.0**-13, 36
BINS = 1 + PER_OCTAVE * OCTAVES  # the first is for what is below
# Of the timeline: buckets of time start at a quarter second and double while there are too many.
FIRST_WIDTH_MS, MOST_BUCKETS = 250, 240
# Its latencies are binned more coarsely.
COARSE = 8
# Nothing in flight for longer than this is a pause, not slowness: another day's run, say. Limits are by the minute.
PAUSE_MS = 60_000
# Rows shown, of each kind.
SAMPLED, FAILED, SLOWEST, EXAMPLES = 40, 15, 10, 4


def bin_of(values: Floats) -> Ints:
    with np.errstate(divide="ignore"):
        at = np.floor(np.log2(values / LOW) * PER_OCTAVE) + 1
    return np.clip(at, 0, BINS - 1).astype(np.int64)


def lower_edge(bins: Any) -> Any:
    """Where a bin begins; the first one at zero."""
    return np.where(np.asarray(bins) <= 0, 0.0, LOW * 2.0 ** ((np.asarray(bins) - 1) / PER_OCTAVE))


@dataclass(slots=True)
class Histogram:
    """Counts in bins of equal ratio, with the exact ends and sum."""

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
        """Within a bin's width of the exact one; 0 where nothing was counted."""
        if not len(self):
            return 0.0
        return float(np.clip(quantile_of(self.counts, np.arange(BINS), q), self.least, self.most))


def quantile_of(counts: Ints, bins: Ints, q: float, size: int = 1) -> float:
    """A quantile, the values of a bin taken as spread evenly over it; `size` of the finest bins make one of `bins`."""
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
    """What came back when: sums for each bucket of time and, within it, bin of latency."""

    width_ms: int = FIRST_WIDTH_MS
    cells: pa.Table = field(default_factory=_CELLS.empty_table)
    # When something was in flight, from and to, in ms since the epoch; apart by more than a pause.
    active_intervals: Ints = field(default_factory=lambda: np.empty((0, 2), np.int64))

    def add(self, done_ms: Ints, latency_s: Floats, sums: Sequence[Ints]) -> None:
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
        """How long anything was in flight, pauses left out."""
        return float((self.active_intervals[:, 1] - self.active_intervals[:, 0]).sum()) / 1000


def _rebucketed(cells: pa.Table, by: int) -> pa.Table:
    return cells.set_column(0, "bucket", pa.array(np.asarray(cells["bucket"]) // by))


def _summed(cells: pa.Table) -> pa.Table:
    sums = cells.group_by(["bucket", "latency"]).aggregate([(name, "sum") for name in SUMS])
    return pa.table([sums["bucket"], sums["latency"], *(sums[f"{name}_sum"] for name in SUMS)], schema=_CELLS)


def _merged(spans: Ints) -> Ints:
    """The union of spans, with whatever lies less than a pause apart made one."""
    if not len(spans):
        return spans
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    ends = np.maximum.accumulate(spans[:, 1])
    opens = np.concatenate([[True], spans[1:, 0] > ends[:-1] + PAUSE_MS])
    first = np.flatnonzero(opens)
    return np.stack([spans[first, 0], ends[np.append(first[1:], len(spans)) - 1]], axis=1)


class Example(NamedTuple):
    """A failed row."""

    at: int  # its index
    id: str
    message: str


class Shown(NamedTuple):
    """A row to be shown, the one with the least `rank` first."""

    rank: float
    at: int  # its index
    row: dict[str, Any]


# Makes a row of a part fit to be shown.
Show = Callable[[int], dict[str, Any]]


@dataclass(slots=True)
class Stats:
    answers: int = 0  # a sum over jobs: one that serves rows of two jobs counts twice
    latency: Histogram = field(default_factory=Histogram)
    input: Histogram = field(default_factory=Histogram)
    output: Histogram = field(default_factory=Histogram)
    timeline: Timeline = field(default_factory=Timeline)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    sample: list[Shown] = field(default_factory=list)  # spread evenly over the input
    failed: list[Shown] = field(default_factory=list)  # likewise
    slowest: list[Shown] = field(default_factory=list)
    broken: str | None = None  # the traceback of a bug in here

    def add(self, at: Ints, index: int, completions: pa.Table, done_at: Any, ids: Sequence[str], show: Show) -> None:
        """Rows of a part: the position of each one's answer in the ledger's index (-1: never asked), and what it was."""
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
            timed = first & (latency > 0)  # what came in a provider's batch has no latency, and no pace
            if timed.any():
                sums = (~failed).astype(np.int64), failed.astype(np.int64), *tokens
                self.timeline.add(done_ms[timed], latency[timed], [column[timed] for column in sums])

            rows = np.arange(len(at))
            # Steps of the golden ratio: the k least are spread evenly, whatever k and however the rows are cut into parts.
            spread = ((index + rows).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.float64)
            wanted = (
                (self.sample, SAMPLED, rows, spread),
                (self.failed, FAILED, rows[failed], spread[failed]),
                (self.slowest, SLOWEST, rows[timed], -latency[timed]),
            )
            for shown, most, some, ranks in wanted:
                best = np.argsort(ranks, kind="stable")[:most]
                found = [(float(ranks[n]), int(some[n])) for n in best if len(shown) < most or ranks[n] < shown[-1].rank]
                shown[:] = _least([*shown, *(Shown(rank, index + row, show(row)) for rank, row in found)], most)
            for row, error in zip(rows[failed].tolist(), completions["error"].drop_null().to_pylist(), strict=True):
                examples = self.examples.setdefault(error["type"], [])
                if len(examples) < EXAMPLES:  # parts are added in their order
                    examples.append(Example(index + row, ids[row], error["message"] or ""))

    def merge(self, other: Stats) -> None:
        with self._contained():
            self.answers += other.answers
            self.latency.merge(other.latency)
            self.input.merge(other.input)
            self.output.merge(other.output)
            self.timeline.merge(other.timeline)
            for type, found in other.examples.items():
                self.examples[type] = _least([*self.examples.get(type, ()), *found], EXAMPLES)
            self.sample = _least([*self.sample, *other.sample], SAMPLED)
            self.failed = _least([*self.failed, *other.failed], FAILED)
            self.slowest = _least([*self.slowest, *other.slowest], SLOWEST)
        self.broken = self.broken or other.broken

    @contextlib.contextmanager
    def _contained(self) -> Iterator[None]:
        """A bug here costs the report, which will say so, and not the run."""
        try:
            yield
        except Exception:
            self.broken = self.broken or traceback.format_exc()


def _least(items: Iterable[T], most: int) -> list[T]:
    return sorted(items, key=lambda item: item[:2])[:most]  # type: ignore[index]
