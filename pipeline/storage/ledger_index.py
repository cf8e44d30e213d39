"""The index of the ledger: the place of the best record of each key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from pipeline.storage.ledger import TOKENS, list_segments, read_columns
from pipeline.storage.retry import TRIES, patiently, store_failed

# Flags of a request in the index.
UNKNOWN, REPRICED = 1, 2
# Computes the cost of records of an earlier version, which wrote none. Takes the token counts, of shape (records, 3):
# input, cached input, output; and the path of the segment. Returns US$ for each record, or None if the price is unknown.
OldCosts = Callable[[npt.NDArray[np.int64], str], npt.NDArray[np.float64] | None]


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Sums over the records of requests that an index leaves out, because they have no answer yet."""

    cost_usd: float = 0.0
    unknown: int = 0  # number of requests with a try of unknown cost
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Index:
    """The place of the best record of every key, and the sums of tokens, cost and attempts over all records of the key,
    superseded ones included. Successes rank before failures, then later records before earlier ones.

    The arrays have one element for each request, 56 bytes in all, and are sorted by key: by `hi`, then by `lo`, the first
    16 of the key's 32 bytes.
    """

    hi: npt.NDArray[np.uint64]
    lo: npt.NDArray[np.uint64]
    segment: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    failed: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.uint32]  # shape (requests, 5), in the order of `TOKENS`
    cost_usd: npt.NDArray[np.float64]  # sum over the records whose cost is known
    flags: npt.NDArray[np.uint8]  # UNKNOWN: the cost of a record is unknown; REPRICED: an `OldCosts` priced it
    attempts: npt.NDArray[np.uint16]
    paths: list[str]
    torn: list[str]  # segments that could not be read
    unanswered: Unanswered = Unanswered()

    def __len__(self) -> int:
        return len(self.hi)

    def find(self, keys: Sequence[bytes] | pa.Array) -> npt.NDArray[np.int64]:
        """The position of each key, or -1."""
        hi, lo = split_keys(keys)
        if not len(self):
            return np.full(len(hi), -1, np.int64)
        at = np.minimum(np.searchsorted(self.hi, hi), len(self) - 1)
        # Keys that agree in 64 bits but not in 128 are neighbours: step from one to the next.
        while True:
            step = (self.hi[at] == hi) & (self.lo[at] != lo) & (at + 1 < len(self))
            step[step] = self.hi[at[step] + 1] == hi[step]
            if not step.any():
                break
            at = at + step
        found = (self.hi[at] == hi) & (self.lo[at] == lo)
        return np.where(found, at, -1)

    def locate(self, keys: Sequence[bytes] | pa.Array) -> Located:
        """The position of each key, or -1; and the segment and row of each key that was found."""
        at = self.find(keys)
        there = at[at >= 0]
        return at, self.segment[there], self.row[there]

    @classmethod
    def empty(cls) -> Index:
        return _index_of([], [])

    def only(self, *, failed_count_as_answered: bool) -> Index:
        """The requests that a run skips: the answered ones and, with `failed_count_as_answered`, the failed ones.

        `spent` returns the same sums as before.
        """
        if failed_count_as_answered or not self.failed.any():
            return self
        at = np.flatnonzero(~self.failed)
        left = _sums(self.cost_usd[self.failed], self.flags[self.failed], self.attempts[self.failed], self.unanswered)
        return replace(self, **{name: getattr(self, name)[at] for name in _COLUMNS}, unanswered=left)

    def spent(self) -> tuple[float, int]:
        """The known cost of all records in US$, and the number of requests with a record of unknown cost."""
        unknown = int((self.flags & UNKNOWN).astype(np.bool_).sum())
        return float(self.cost_usd.sum()) + self.unanswered.cost_usd, unknown + self.unanswered.unknown


class KeyLookup(Protocol):
    """Finds requests in the ledger. An `Index` is one; so is a client of a service that holds an `Index`."""

    @property
    def paths(self) -> list[str]:
        """The paths of the segments. The segment numbers are positions in this list."""

    def find(self, keys: Sequence[bytes] | pa.Array) -> npt.NDArray[np.int64]:
        """The position of each key, or -1."""

    def locate(self, keys: Sequence[bytes] | pa.Array) -> Located:
        """The position of each key, or -1; and the segment and row of each key that was found."""


# Positions in the index, or -1; and the segments and rows of the keys that were found.
Located = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32]]
_COLUMNS = ("hi", "lo", "segment", "row", "failed", "tokens", "cost_usd", "flags", "attempts")


@dataclass(slots=True)
class _Keys:
    """The columns of one segment that the index needs: arrays with one element for each record."""

    hi: npt.NDArray[np.uint64]
    lo: npt.NDArray[np.uint64]
    rank: npt.NDArray[np.uint8]  # 0: answered, 1: failed, 2: superseded
    done_at: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.uint32]
    cost_usd: npt.NDArray[np.float64]  # 0 if unknown
    flags: npt.NDArray[np.uint8]
    attempts: npt.NDArray[np.uint16]


_DTYPES = {"hi": np.uint64, "lo": np.uint64, "rank": np.uint8, "done_at": np.int64, "tokens": np.uint32,
           "cost_usd": np.float64, "flags": np.uint8, "attempts": np.uint16}  # fmt: skip


def split_keys(keys: Sequence[bytes] | pa.Array) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Bytes 0 to 7 and bytes 8 to 15 of 32-byte keys, as integers that sort like the bytes."""
    if isinstance(keys, (pa.Array, pa.ChunkedArray)):
        array = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
        data = array.buffers()[1]
        raw = memoryview(data)[array.offset * 32 : (array.offset + len(array)) * 32] if data is not None else b""
    else:
        raw = b"".join(keys)
    halves = np.frombuffer(raw, dtype=">u8").reshape(-1, 4)
    return halves[:, 0].astype(np.uint64), halves[:, 1].astype(np.uint64)


def read_index(fs: pafs.FileSystem, root: str, old_costs: OldCosts | None = None) -> Index:
    """Reads the keys of all segments. A segment that cannot be read is skipped and listed in `torn`. Without `old_costs`,
    the cost of records of an earlier version is unknown. Raises `OSError` if segments are merged during each of `TRIES`
    tries."""
    for _ in range(TRIES):
        paths = list_segments(fs, root)
        try:
            with ThreadPoolExecutor(8) as pool:
                return _index_of(paths, list(pool.map(lambda path: _read_keys(fs, path, old_costs), paths)))
        except FileNotFoundError:  # merged since the listing; the next listing has the merged segment
            continue
    raise OSError(f"the segments under {root} change faster than they can be read")


def _index_of(paths: list[str], parts: list[_Keys | None]) -> Index:
    """Builds the index column by column and frees each input, so that memory stays close to the size of the result."""
    torn = [path for path, part in zip(paths, parts, strict=True) if part is None]
    numbers = [number for number, part in enumerate(parts) if part is not None]
    sizes = [len(part.hi) for part in parts if part is not None]
    columns: dict[str, Any] = {}
    for name, dtype in _DTYPES.items():
        found = [getattr(part, name) for part in parts if part is not None]
        columns[name] = np.concatenate(found) if found else np.empty((0, len(TOKENS)) if name == "tokens" else 0, dtype)
        for part in filter(None, parts):
            setattr(part, name, None)
    parts.clear()
    columns["segment"] = np.repeat(np.array(numbers, np.int32), sizes)
    columns["row"] = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]) if sizes else np.empty(0, np.int32)
    order = _order(*(columns[name] for name in ("hi", "lo", "rank", "done_at")))
    for name, column in columns.items():
        columns[name] = column[order]
    del order
    columns, unanswered = _summed(columns)
    columns["failed"] = columns.pop("rank") > 0
    return Index(**columns, paths=paths, torn=torn, unanswered=unanswered)


def _summed(columns: dict[str, Any]) -> tuple[dict[str, Any], Unanswered]:
    """Reduces sorted records to one row for each key: the place of its first record, and the sums over all its records.
    Keys with superseded records only are returned as `Unanswered`. A record that occurs twice, because its segment was
    being merged, counts once."""
    hi, lo, rank, done_at = (columns[name] for name in ("hi", "lo", "rank", "done_at"))
    first = np.ones(len(hi), np.bool_)
    first[1:] = (hi[1:] != hi[:-1]) | (lo[1:] != lo[:-1])
    del columns["done_at"]  # needed for the order only
    if not first.all():
        once = np.ones(len(hi), np.bool_)
        once[1:] = first[1:] | (rank[1:] != rank[:-1]) | (done_at[1:] != done_at[:-1])
        starts = np.flatnonzero(first)
        for name in ("tokens", "cost_usd", "attempts"):
            columns[name][~once] = 0
            columns[name] = np.add.reduceat(columns[name], starts, axis=0, dtype=columns[name].dtype)
        columns["flags"] = np.bitwise_or.reduceat(columns["flags"], starts)
        for name in ("hi", "lo", "rank", "segment", "row"):
            columns[name] = columns[name][first]
    tried = columns["rank"] == 2
    if not tried.any():
        return columns, Unanswered()
    left = _sums(*(columns[name][tried] for name in ("cost_usd", "flags", "attempts")))
    return {name: column[~tried] for name, column in columns.items()}, left


def _sums(cost_usd: Any, flags: Any, attempts: Any, more: Unanswered = Unanswered()) -> Unanswered:
    unknown = int((flags & UNKNOWN).astype(np.bool_).sum())
    sums = more.cost_usd + float(cost_usd.sum()), more.unknown + unknown, more.attempts + int(attempts.sum(dtype=np.int64))
    return Unanswered(*sums)


def _order(
    hi: npt.NDArray[np.uint64], lo: npt.NDArray[np.uint64], rank: npt.NDArray[np.uint8], done_at: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The order by key, then rank, then latest first. Nearly all keys differ in `hi`; only equal ones are compared
    further."""
    order = np.argsort(hi, kind="stable")
    equal = np.zeros(len(order) + 1, np.bool_)
    equal[1:-1] = hi[order[1:]] == hi[order[:-1]]
    at = np.flatnonzero(equal[1:] | equal[:-1])
    some = order[at]
    order[at] = some[np.lexsort((-done_at[some], rank[some], lo[some], hi[some]))]
    return order


def _read_keys(fs: pafs.FileSystem, path: str, old_costs: OldCosts | None = None) -> _Keys | None:
    names = ["key", "error.type", "done_at", "usage", "cost_usd", "attempts", "superseded"]
    try:
        table = patiently(lambda: read_columns(fs, path, names))
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        if store_failed(error):  # the segment may be intact; asking its rows again would cost money twice
            raise
        return None
    try:
        old = "cost_usd" not in table.column_names
        tokens = np.zeros((len(table), len(TOKENS)), np.uint32)
        for at, name in enumerate(TOKENS):
            if not old or at < 3:
                tokens[:, at] = np.asarray(pc.fill_null(pc.struct_field(table["usage"], name), 0))
        if old:
            costs = None if old_costs is None else old_costs(tokens[:, :3].astype(np.int64), path)
            flags = tokens.any(axis=1).astype(np.uint8) * (REPRICED if costs is not None else UNKNOWN)
            superseded = np.zeros(len(table), np.bool_)
        else:
            costs = np.asarray(pc.fill_null(table["cost_usd"], 0.0))
            flags = np.asarray(pc.is_null(table["cost_usd"])).astype(np.uint8) * UNKNOWN
            superseded = np.asarray(pc.fill_null(table["superseded"], False))
        failed = np.asarray(pc.is_valid(pc.struct_field(table["error"], "type")))
        return _Keys(
            *split_keys(table["key"].cast(pa.binary(32))),
            np.asarray(np.where(superseded, 2, failed), np.uint8),
            np.asarray(table["done_at"].cast(pa.int64())),
            tokens,
            np.zeros(len(table)) if costs is None else costs,
            np.asarray(flags, np.uint8),
            np.asarray(pc.fill_null(table["attempts"], 1)).clip(0, 65535).astype(np.uint16),
        )
    except (pa.ArrowException, KeyError, TypeError, ValueError):  # a Parquet file of another program, with other columns
        return None


class DedupFilter:
    """A compact set of keys, 8 bytes each, that detects duplicate requests.

    Two different keys may agree in 64 bits. Then finalize finds the row that was held back without an answer, and another
    pass asks it. A collision costs time, never a row.
    """

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.uint64]] = []

    def add(self, keys: pa.Array) -> npt.NDArray[np.bool_]:
        """Adds keys. Returns a mask of the new ones; of several equal new keys, only the first is marked."""
        hi, _ = split_keys(keys)
        unique, first = np.unique(hi, return_index=True)
        new = np.ones(len(unique), np.bool_)
        for run in self._runs:
            new &= run[np.minimum(np.searchsorted(run, unique), len(run) - 1)] != unique
        fresh = unique[new]
        if len(fresh):
            # Runs grow geometrically, as in an LSM tree: adding stays cheap and there are few runs.
            while self._runs and len(self._runs[-1]) <= 2 * len(fresh):
                fresh = np.concatenate([self._runs.pop(), fresh])
                fresh.sort(kind="stable")  # stable sort merges two sorted runs in linear time
            self._runs.append(fresh)
        mask = np.zeros(len(hi), np.bool_)
        mask[first[new]] = True
        return mask
