"""The ledger: which requests are answered. Segments are its only form.

A worker writes what it finished as small immutable Parquet files under `_segments/`, each under a name nobody else
uses, complete or not there at all. Nothing is appended, nothing locked, no writer is central, and a file that is torn
or missing costs its own rows only. Reading the ledger is reading the keys of all segments.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engines.types import Completion, Usage
from pipeline.fs import TRIES, listing, patiently, store_failed, write_atomic
from pipeline.lossless import dumps

SEGMENTS = "_segments"
# So many segments become one, while they have less than so many bytes.
FAN, FULL_BYTES = 64, 128 << 20

USAGE = pa.struct([("input", pa.int64()), ("cached_input", pa.int64()), ("output", pa.int64())])
ERROR = pa.struct([("type", pa.string()), ("message", pa.string()), ("status", pa.int64()), ("retryable", pa.bool_())])

# What a completion becomes, in a segment and in the final output alike.
COMPLETION_FIELDS = [
    ("response", pa.string()),
    ("finish_reason", pa.string()),
    ("tool_calls", pa.string()),
    ("reasoning", pa.string()),
    ("usage", USAGE),
    ("model", pa.string()),
    ("engine", pa.string()),
    ("attempts", pa.int32()),
    ("latency_s", pa.float64()),
    ("error", ERROR),
    ("choices", pa.string()),
    ("logprobs", pa.string()),
    ("dialogue", pa.string()),
]
SEGMENT_SCHEMA = pa.schema(
    [("key", pa.binary(32)), ("id", pa.string()), *COMPLETION_FIELDS, ("done_at", pa.timestamp("ms", tz="UTC"))]
)


@dataclass(slots=True)
class Record:
    """A finished request on its way into a segment."""

    key: bytes
    id: str
    completion: Completion
    done_at: float  # seconds since the epoch


def completion_columns(completions: Sequence[Completion]) -> list[pa.Array]:
    """The columns of `COMPLETION_FIELDS`, one value per completion."""
    columns = (
        [c.text for c in completions],
        [c.finish_reason for c in completions],
        [_json(c.tool_calls) for c in completions],
        [c.reasoning for c in completions],
        [None if c.error and c.usage == Usage() else
         {"input": c.usage.input, "cached_input": c.usage.cached_input, "output": c.usage.output}
         for c in completions],
        [c.model for c in completions],
        [c.engine for c in completions],
        [c.attempts for c in completions],
        [c.latency_s for c in completions],
        [c.error and {"type": c.error.type, "message": c.error.message, "status": c.error.status,
                      "retryable": c.error.retryable} for c in completions],
        [_choices(c) for c in completions],
        [_json(c.logprobs) for c in completions],
        [_json(c.dialogue) for c in completions],
    )  # fmt: skip
    return [pa.array(values, type) for values, (_, type) in zip(columns, COMPLETION_FIELDS, strict=True)]


def _json(value: Any) -> str | None:
    return dumps(value).decode() if value else None


def _choices(completion: Completion) -> str | None:
    """All answers where more than one was asked for (`n`); the first also stands in the plain columns."""
    if len(completion.choices) < 2:
        return None
    return _json(
        [{"message": c.message, "finish_reason": c.finish_reason, "logprobs": c.logprobs} for c in completion.choices]
    )


def write_segment(fs: pafs.FileSystem, root: str, writer: str, records: Sequence[Record]) -> str:
    """Makes `records` durable as one new segment and returns its path."""
    columns = [
        pa.array([r.key for r in records], pa.binary(32)),
        pa.array([r.id for r in records], pa.string()),
        *completion_columns([r.completion for r in records]),
        pa.array([int(r.done_at * 1000) for r in records], pa.timestamp("ms", tz="UTC")),
    ]
    return _put(fs, root, writer, pa.Table.from_arrays(columns, schema=SEGMENT_SCHEMA))


def _put(fs: pafs.FileSystem, root: str, writer: str, table: pa.Table) -> str:
    sink = io.BytesIO()
    # The keys are random bytes: a dictionary or statistics for them would only cost time.
    options = {"use_dictionary": ["finish_reason", "model", "engine"], "write_statistics": False}
    pq.write_table(table, sink, compression="zstd", **options)
    path = f"{root}/{SEGMENTS}/{writer}-{uuid.uuid4().hex[:12]}.parquet"
    write_atomic(fs, path, sink.getvalue())
    return path


class Compactor:
    """Merges one writer's own segments, so that a long run leaves few: a day of `flush_s=2` would be 43,000 files.

    As soon as there are `FAN` of one level they become one of the next, unless they have `FULL_BYTES` already. The merged
    one is whole before the others go: a reader may see rows twice, never less than once.
    """

    def __init__(self, fs: pafs.FileSystem, root: str, writer: str) -> None:
        self.fs, self.root, self.writer = fs, root, writer
        self.levels: list[list[str]] = []

    def add(self, path: str, level: int = 0) -> None:
        """Takes note of a new segment. Raises `OSError` where merging fails, with nothing lost."""
        if level == len(self.levels):
            self.levels.append([])
        self.levels[level].append(path)
        if len(self.levels[level]) < FAN:
            return
        paths, self.levels[level] = self.levels[level], []
        if sum(info.size for info in patiently(lambda: self.fs.get_file_info(paths))) > FULL_BYTES:
            return
        table = pa.concat_tables(read_segment(self.fs, path) for path in paths)
        merged = _put(self.fs, self.root, self.writer, table)
        for old in paths:
            self.fs.delete_file(old)
        self.add(merged, level + 1)


def list_segments(fs: pafs.FileSystem, root: str) -> list[str]:
    """The paths of all segments, sorted."""
    return sorted(f.path for f in listing(fs, f"{root}/{SEGMENTS}") if f.is_file and f.path.endswith(".parquet"))


def read_segment(fs: pafs.FileSystem, path: str) -> pa.Table:
    """One whole segment; columns that an earlier version did not write are null."""
    table = patiently(lambda: _read(fs, path))
    for part in SEGMENT_SCHEMA:
        if part.name not in table.column_names:
            table = table.append_column(part, pa.nulls(len(table), part.type))
    return table.select(SEGMENT_SCHEMA.names).cast(SEGMENT_SCHEMA)


def _read(fs: pafs.FileSystem, path: str, columns: list[str] | None = None) -> pa.Table:
    with fs.open_input_file(path) as file:
        return pq.ParquetFile(file).read(columns=columns)


@dataclass(frozen=True, slots=True)
class Index:
    """Where the best record of every key lies: successes before failures, then the latest.

    Arrays of one length, sorted by key (`hi`, then `lo`: the first 16 of its 32 bytes); 37 bytes a request.
    """

    hi: npt.NDArray[np.uint64]
    lo: npt.NDArray[np.uint64]
    segment: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    failed: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.uint32]  # (requests, 3): input, cached input, output
    paths: list[str]
    torn: list[str]  # segments that could not be read

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

    @classmethod
    def empty(cls) -> Index:
        return _index_of([], [])

    def only(self, *, failed_too: bool) -> Index:
        """What the feed skips: the answered requests and, if asked, also the failed ones."""
        if failed_too or not self.failed.any():
            return self
        at = np.flatnonzero(~self.failed)
        return Index(
            self.hi[at],
            self.lo[at],
            self.segment[at],
            self.row[at],
            self.failed[at],
            self.tokens[at],
            self.paths,
            self.torn,
        )


_Keys = tuple[
    npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.uint32]
]


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


def read_index(fs: pafs.FileSystem, root: str) -> Index:
    """Reads the keys of all segments. A segment that cannot be read is passed over and named in `torn`."""
    for _ in range(TRIES):
        paths = list_segments(fs, root)
        try:
            with ThreadPoolExecutor(8) as pool:
                return _index_of(paths, list(pool.map(lambda path: _read_keys(fs, path), paths)))
        except FileNotFoundError:  # merged meanwhile, into one that the next listing has
            continue
    raise OSError(f"the segments under {root} change faster than they can be read")


def _index_of(paths: list[str], parts: list[_Keys | None]) -> Index:
    torn = [path for path, part in zip(paths, parts, strict=True) if part is None]
    good = [(number, part) for number, part in enumerate(parts) if part is not None]
    hi = _join((part[0] for _, part in good), np.uint64)
    lo = _join((part[1] for _, part in good), np.uint64)
    failed = _join((part[2] for _, part in good), np.bool_)
    done_at = _join((part[3] for _, part in good), np.int64)
    tokens = np.concatenate([part[4] for _, part in good]) if good else np.empty((0, 3), np.uint32)
    segment = _join((np.full(len(part[0]), number, np.int32) for number, part in good), np.int32)
    row = _join((np.arange(len(part[0]), dtype=np.int32) for _, part in good), np.int32)
    order = np.lexsort((-done_at, failed, lo, hi))
    hi, lo = hi[order], lo[order]
    first = np.ones(len(hi), np.bool_)
    first[1:] = (hi[1:] != hi[:-1]) | (lo[1:] != lo[:-1])
    best = order[first]
    return Index(hi[first], lo[first], segment[best], row[best], failed[best], tokens[best], paths, torn)


def _read_keys(fs: pafs.FileSystem, path: str) -> _Keys | None:
    try:
        table = patiently(lambda: _read(fs, path, ["key", "error.type", "done_at", "usage"]))
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        if store_failed(error):  # it may be whole; asking its rows again would cost them a second time
            raise
        return None
    hi, lo = split_keys(table["key"].cast(pa.binary(32)))
    failed = np.asarray(pc.is_valid(pc.struct_field(table["error"], "type")))
    usage = [np.asarray(pc.fill_null(pc.struct_field(table["usage"], f.name), 0)).astype(np.uint32) for f in USAGE]
    return hi, lo, failed, np.asarray(table["done_at"].cast(pa.int64())), np.stack(usage, axis=1)


def _join(parts: Iterable[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    found = list(parts)
    return np.concatenate(found) if found else np.empty(0, dtype)


class SeenKeys:
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
                fresh = np.union1d(self._runs.pop(), fresh)
            self._runs.append(fresh)
        mask = np.zeros(len(hi), np.bool_)
        mask[first[new]] = True
        return mask
