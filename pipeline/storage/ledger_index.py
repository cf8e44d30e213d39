"""The index of the ledger: where the best record of each key is."""

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
# Prices the records of an earlier version, which wrote no cost: their tokens (input, cached input, output) and the path of
# their segment -> US$ for each; None where the price is not known.
OldCosts = Callable[[npt.NDArray[np.int64], str], npt.NDArray[np.float64] | None]


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Sums over the records of requests that an index leaves out: they have no answer yet."""

    cost_usd: float = 0.0
    unknown: int = 0  # requests with a try of unknown cost
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Index:
    """Where the best record of every key lies: successes before failures, then the latest. And what all records of the
    key took, superseded ones included.

    Arrays of one length, sorted by key (`hi`, then `lo`: the first 16 of its 32 bytes); 56 bytes a request.
    """

    hi: npt.NDArray[np.uint64]
    lo: npt.NDArray[np.uint64]
    segment: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    failed: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.uint32]  # (requests, 5): in the order of `TOKENS`
    cost_usd: npt.NDArray[np.float64]  # of the records whose cost is known
    flags: npt.NDArray[np.uint8]  # UNKNOWN: the cost of a record is not known; REPRICED: an `OldCosts` gave it
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
        # Two keys that agree in 64 bits but not in 128 stand side by side; step over the first where it happens.
        while True:
            step = (self.hi[at] == hi) & (self.lo[at] != lo) & (at + 1 < len(self))
            step[step] = self.hi[at[step] + 1] == hi[step]
            if not step.any():
                break
            at = at + step
        found = (self.hi[at] == hi) & (self.lo[at] == lo)
        return np.where(found, at, -1)

    def locate(self, keys: Sequence[bytes] | pa.Array) -> Located:
        """The position of each key, or -1, and the segment and row of each that is there."""
        at = self.find(keys)
        there = at[at >= 0]
        return at, self.segment[there], self.row[there]

    @classmethod
    def empty(cls) -> Index:
        return _index_of([], [])

    def only(self, *, failed_too: bool) -> Index:
        """What the feed skips: the answered requests and, if asked, also the failed ones. `spent` stays what it was."""
        if failed_too or not self.failed.any():
            return self
        at = np.flatnonzero(~self.failed)
        left = _sums(self.cost_usd[self.failed], self.flags[self.failed], self.attempts[self.failed], self.unanswered)
        return replace(self, **{name: getattr(self, name)[at] for name in _COLUMNS}, unanswered=left)

    def spent(self) -> tuple[float, int]:
        """US$ for everything in the ledger, as far as it is known, and the number of requests where it is not."""
        unknown = int((self.flags & UNKNOWN).astype(np.bool_).sum())
        return float(self.cost_usd.sum()) + self.unanswered.cost_usd, unknown + self.unanswered.unknown


class KeyLookup(Protocol):
    """Finds requests in the ledger: an `Index`, or a service that has one."""

    @property
    def paths(self) -> list[str]:
        """The segments, by number."""

    def find(self, keys: Sequence[bytes] | pa.Array) -> npt.NDArray[np.int64]:
        """The position of each key, or -1."""

    def locate(self, keys: Sequence[bytes] | pa.Array) -> Located:
        """The position of each key, or -1, and the segment and row of each key that was found."""


# Positions in the index or -1; segments and rows of those that are there.
Located = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32]]
_COLUMNS = ("hi", "lo", "segment", "row", "failed", "tokens", "cost_usd", "flags", "attempts")


@dataclass(slots=True)
class _Keys:
    """What the index reads of one segment; arrays of one length."""

    hi: npt.NDArray[np.uint64]
    lo: npt.NDArray[np.uint64]
    rank: npt.NDArray[np.uint8]  # 0: answered, 1: failed, 2: superseded
    done_at: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.uint32]
    cost_usd: npt.NDArray[np.float64]  # 0 where it is not known
    flags: npt.NDArray[np.uint8]
    attempts: npt.NDArray[np.uint16]


_DTYPES = {"hi": np.uint64, "lo": np.uint64, "rank": np.uint8, "done_at": np.int64, "tokens": np.uint32,
           "cost_usd": np.float64, "flags": np.uint8, "attempts": np.uint16}  # fmt: skip


def split_keys(keys: Sequence[bytes] | pa.Array) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """The first and the second 8 bytes of 32-byte keys, as numbers that sort like them."""
    if isinstance(keys, (pa.Array, pa.ChunkedArray)):
        array = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
        data = array.buffers()[1]
        raw = memoryview(data)[array.offset * 32 : (array.offset + len(array)) * 32] if data is not None else b""
    else:
        raw = b"".join(keys)
    halves = np.frombuffer(raw, dtype=">u8").reshape(-1, 4)
    return halves[:, 0].astype(np.uint64), halves[:, 1].astype(np.uint64)


def read_index(fs: pafs.FileSystem, root: str, old_costs: OldCosts | None = None) -> Index:
    """Reads the keys of all segments. A segment that cannot be read is passed over and named in `torn`. Without `old_costs`
    the cost of what an earlier version wrote is not known."""
    for _ in range(TRIES):
        paths = list_segments(fs, root)
        try:
            with ThreadPoolExecutor(8) as pool:
                return _index_of(paths, list(pool.map(lambda path: _read_keys(fs, path, old_costs), paths)))
        except FileNotFoundError:  # merged meanwhile, into one that the next listing has
            continue
    raise OSError(f"the segments under {root} change faster than they can be read")


def _index_of(paths: list[str], parts: list[_Keys | None]) -> Index:
    """Holds little more than its result: each column is joined, then put in order, and what it came from is gone."""
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
    """One row for each key, of records in order: the place of the first record, and the sums of all; keys that have only
    superseded records apart. A record that stands there twice, since its segment was being merged, counts once."""
    hi, lo, rank, done_at = (columns[name] for name in ("hi", "lo", "rank", "done_at"))
    first = np.ones(len(hi), np.bool_)
    first[1:] = (hi[1:] != hi[:-1]) | (lo[1:] != lo[:-1])
    del columns["done_at"]  # when it was done has no more to say
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
    """By key, then rank, then the latest. Nearly all keys differ in `hi`; only the rest is looked at."""
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
        if store_failed(error):  # it may be whole; asking its rows again would cost them a second time
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
    except (pa.ArrowException, KeyError, TypeError, ValueError):  # another program's Parquet file, with other columns
        return None


class DedupFilter:
    """A compact set of the keys that passed by, 8 bytes each: the hint by which duplicates are held back.

    Two different keys may collide in 64 bits; the one held back is then found missing when the output is put
    together, and asked in another pass. So a collision costs time, never a row.
    """

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.uint64]] = []

    def add(self, keys: pa.Array) -> npt.NDArray[np.bool_]:
        """Adds keys; tells which of them were new, the first of several equal ones counting as new."""
        hi, _ = split_keys(keys)
        unique, first = np.unique(hi, return_index=True)
        new = np.ones(len(unique), np.bool_)
        for run in self._runs:
            new &= run[np.minimum(np.searchsorted(run, unique), len(run) - 1)] != unique
        fresh = unique[new]
        if len(fresh):
            # Runs grow geometrically, as in an LSM tree, so that adding stays cheap and the runs stay few.
            while self._runs and len(self._runs[-1]) <= 2 * len(fresh):
                fresh = np.concatenate([self._runs.pop(), fresh])
                fresh.sort(kind="stable")  # two runs in order, so merged rather than sorted
            self._runs.append(fresh)
        mask = np.zeros(len(hi), np.bool_)
        mask[first[new]] = True
        return mask
