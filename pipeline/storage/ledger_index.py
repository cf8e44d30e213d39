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

from pipeline.storage.ledger import KEY_VERSION, LENGTHS, TOKENS, list_segments, read_segment_columns
from pipeline.storage.retry import TRIES, patiently, store_failed

# Flags of a request in the index. TRUNCATED: the finish reason of its answer is `length`. OLD: its key is of an earlier
# version.
UNKNOWN, REPRICED, TRUNCATED, OLD = 1, 2, 4, 8
# The result of a request in the ledger, as `KeyLookup.results` returns it. DONE_TRUNCATED: done, but the
# answer is truncated.
MISSING, DONE, FAILED, DONE_TRUNCATED = -1, 0, 1, 2
# Computes the cost of records of an earlier version, which did not write it. Takes the token counts, of shape (records, 3):
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
    flags: npt.NDArray[np.uint8]  # UNKNOWN: the cost of a record is unknown; REPRICED: an `OldCosts` priced it; OLD
    attempts: npt.NDArray[np.uint16]
    paths: list[str]
    torn: list[str]  # segments that could not be read
    row_bytes: npt.NDArray[np.int64]  # for each path: the approximate bytes of one record in memory
    old_until_ms: int = 0  # the time of the last record with a key of an earlier version; 0: there is none
    unanswered: Unanswered = Unanswered()
    lengths: frozenset[int] = frozenset()  # of the embeddings in all segments

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

    def results(self, keys: Sequence[bytes] | pa.Array) -> npt.NDArray[np.int8]:
        """The result of each key: MISSING, DONE, FAILED or DONE_TRUNCATED."""
        at = self.find(keys)
        if not len(self):
            return at.astype(np.int8)
        found = np.where(self.failed[at], FAILED, np.where(self.flags[at] & TRUNCATED, DONE_TRUNCATED, DONE))
        return np.where(at < 0, MISSING, found).astype(np.int8)

    def locate(self, keys: Sequence[bytes] | pa.Array) -> Located:
        """The position of each key, or -1; and the segment and row of each key that was found."""
        at = self.find(keys)
        there = at[at >= 0]
        return at, self.segment[there], self.row[there]

    @property
    def answer_bytes(self) -> float:
        """The approximate mean bytes of a record in memory."""
        if not len(self):
            return 0.0
        return float(np.bincount(self.segment, minlength=len(self.paths)) @ self.row_bytes) / len(self)

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
    """Finds requests in the ledger. An `Index` does, and so does a client of an actor that holds an `Index`."""

    @property
    def paths(self) -> list[str]:
        """The paths of the segments. The segment numbers are positions in this list."""

    @property
    def row_bytes(self) -> npt.NDArray[np.int64]:
        """For each path: the approximate bytes of one record in memory."""

    @property
    def old_until_ms(self) -> int:
        """The time of the last record with a key of an earlier version, in ms since the epoch; 0: there is none."""

    def find(self, keys: Sequence[bytes] | pa.Array) -> npt.NDArray[np.int64]:
        """The position of each key, or -1."""

    def results(self, keys: Sequence[bytes] | pa.Array) -> npt.NDArray[np.int8]:
        """The result of each key: MISSING, DONE, FAILED or DONE_TRUNCATED."""

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
    row_bytes: int = 0
    lengths: frozenset[int] = frozenset()  # see `Index`


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
    raise OSError(f"other processes merged segments under {root} during each of {TRIES} reads of the ledger; try again")


def _index_of(paths: list[str], parts: list[_Keys | None]) -> Index:
    """Builds the index column by column and frees each input, so that memory stays close to the size of the result."""
    torn = [path for path, part in zip(paths, parts, strict=True) if part is None]
    numbers = [number for number, part in enumerate(parts) if part is not None]
    sizes = [len(part.hi) for part in parts if part is not None]
    row_bytes = np.array([0 if part is None else part.row_bytes for part in parts], np.int64)
    old = [part.done_at[(part.flags & OLD) > 0] for part in parts if part is not None]
    old_until_ms = max((int(times.max()) for times in old if len(times)), default=0)
    lengths = frozenset[int]().union(*(part.lengths for part in parts if part is not None))
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
    index = Index(**columns, paths=paths, torn=torn, row_bytes=row_bytes, old_until_ms=old_until_ms)
    return replace(index, unanswered=unanswered, lengths=lengths)


def _summed(columns: dict[str, Any]) -> tuple[dict[str, Any], Unanswered]:
    """Reduces sorted records to one row for each key: the place of its first record, and the sums over all its records.
    Removes keys that have only superseded records, and returns the sums over them as `Unanswered`. A record that occurs
    twice, because its segment was being merged, counts once."""
    hi, lo, rank, done_at = (columns[name] for name in ("hi", "lo", "rank", "done_at"))
    first = np.ones(len(hi), np.bool_)
    first[1:] = (hi[1:] != hi[:-1]) | (lo[1:] != lo[:-1])
    del columns["done_at"]  # needed for the order only
    if not first.all():
        first_copy = np.ones(len(hi), np.bool_)
        first_copy[1:] = first[1:] | (rank[1:] != rank[:-1]) | (done_at[1:] != done_at[:-1])
        starts = np.flatnonzero(first)
        for name in ("tokens", "cost_usd", "attempts"):
            columns[name][~first_copy] = 0
            columns[name] = np.add.reduceat(columns[name], starts, axis=0, dtype=columns[name].dtype)
        best = columns["flags"][starts] & TRUNCATED  # of the record that answers the request; the other flags are sums
        columns["flags"] = np.bitwise_or.reduceat(columns["flags"], starts) & ~np.uint8(TRUNCATED) | best
        for name in ("hi", "lo", "rank", "segment", "row"):
            columns[name] = columns[name][first]
    superseded = columns["rank"] == 2
    if not superseded.any():
        return columns, Unanswered()
    left = _sums(*(columns[name][superseded] for name in ("cost_usd", "flags", "attempts")))
    return {name: column[~superseded] for name, column in columns.items()}, left


def _sums(cost_usd: Any, flags: Any, attempts: Any, more: Unanswered = Unanswered()) -> Unanswered:
    unknown = int((flags & UNKNOWN).astype(np.bool_).sum())
    sums = more.cost_usd + float(cost_usd.sum()), more.unknown + unknown, more.attempts + int(attempts.sum(dtype=np.int64))
    return Unanswered(*sums)


def _order(
    hi: npt.NDArray[np.uint64], lo: npt.NDArray[np.uint64], rank: npt.NDArray[np.uint8], done_at: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The positions sorted by key, then rank, then latest first. Nearly all keys differ in `hi`. Only records with an equal
    `hi` are compared further."""
    order = np.argsort(hi, kind="stable")
    equal = np.zeros(len(order) + 1, np.bool_)
    equal[1:-1] = hi[order[1:]] == hi[order[:-1]]
    at = np.flatnonzero(equal[1:] | equal[:-1])
    some = order[at]
    order[at] = some[np.lexsort((-done_at[some], rank[some], lo[some], hi[some]))]
    return order


def _read_keys(fs: pafs.FileSystem, path: str, old_costs: OldCosts | None = None) -> _Keys | None:
    names = ["key", "error.type", "done_at", "usage", "cost_usd", "attempts", "superseded", "finish_reason"]
    try:
        table, row_bytes = patiently(lambda: read_segment_columns(fs, path, names))
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        if store_failed(error):  # the segment may be intact; sending its rows again would cost money twice
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
            flags = tokens.any(axis=1).astype(np.uint8) * np.uint8(REPRICED if costs is not None else UNKNOWN)
            superseded = np.zeros(len(table), np.bool_)
        else:
            costs = np.asarray(pc.fill_null(table["cost_usd"], 0.0))
            flags = np.asarray(pc.is_null(table["cost_usd"])).astype(np.uint8) * np.uint8(UNKNOWN)
            superseded = np.asarray(pc.fill_null(table["superseded"], False))
        metadata = table.schema.metadata or {}
        if not KEY_VERSION.items() <= metadata.items():
            flags = flags | np.uint8(OLD)
        failed = np.asarray(pc.is_valid(pc.struct_field(table["error"], "type")))
        truncated = np.asarray(pc.fill_null(pc.equal(table["finish_reason"], "length"), False))
        flags |= truncated.astype(np.uint8) * np.uint8(TRUNCATED)
        return _Keys(
            *split_keys(table["key"].cast(pa.binary(32))),
            np.asarray(np.where(superseded, 2, failed), np.uint8),
            np.asarray(table["done_at"].cast(pa.int64())),
            tokens,
            np.zeros(len(table)) if costs is None else costs,
            flags,
            np.asarray(pc.fill_null(table["attempts"], 1)).clip(0, 65535).astype(np.uint16),
            row_bytes,
            frozenset(map(int, metadata[LENGTHS].split(b","))) if LENGTHS in metadata else frozenset(),
        )
    except (pa.ArrowException, KeyError, TypeError, ValueError):  # a Parquet file of another program, with other columns
        return None


class DedupFilter:
    """A compact set of keys, 8 bytes each, that detects duplicate requests.

    Two different keys may agree in 64 bits. Then the second row counts as a duplicate and is not asked. Finalize finds that
    it has no answer, and another pass asks it. A collision costs time, never a row.
    """

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.uint64]] = []

    def contains(self, keys: Sequence[bytes] | pa.Array) -> npt.NDArray[np.bool_]:
        """True for each key that was added."""
        hi, _ = split_keys(keys)
        found = np.zeros(len(hi), np.bool_)
        for run in self._runs:
            found |= run[np.minimum(np.searchsorted(run, hi), len(run) - 1)] == hi
        return found

    def add(self, keys: Sequence[bytes] | pa.Array) -> npt.NDArray[np.bool_]:
        """Adds keys. Returns a mask of the new ones; of several equal new keys, only the first is marked."""
        return self.add_hashes(split_keys(keys)[0])

    def add_hashes(self, hi: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """As `add`, for the first 64 bits of keys."""
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
