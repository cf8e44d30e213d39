"""Appends the answered rows of an output to a Delta Lake or Lance table (`output.table`), each row exactly once.

A commit to the table carries the id of this output and a number, in the same transaction as the rows. The rows of a commit
are written down in the output before it:
    _table/ID-00003.keys (the rows) -> commit 3 of the table -> _table/ID.json (committed: 3)
After a kill, the table itself tells if the last commit was made.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engines.errors import ConfigError, ErrorCode
from engines.text import one_line
from pipeline.dataset.tables import find_table
from pipeline.errors import Stopped
from pipeline.output.table_sinks import Sink, sink_of
from pipeline.storage.filesystem import canonical_place, listing, remove, write_atomic
from pipeline.storage.output_files import TABLE, is_table_file, read_json

# A row is known by 16 bytes of its request's key. Failed rows have zeros.
ID_BYTES = 16
NO_ID = bytes(ID_BYTES)
Ids = npt.NDArray[np.bytes_]


def check_table(path: str | None) -> None:
    """Raises `ConfigError` if this is not the path of a table, or its package is missing."""
    if path is None:
        return
    table = find_table(path)
    if table is None or table.version is not None:
        text = f"output.table={path} is not a table: name delta://TABLE, a directory with a Delta table, or NAME.lance"
        raise ConfigError(text, key="output.table")
    sink_of(table)


def append_rows(fs: pafs.FileSystem, root: str, path: str, parts: Mapping[str, bytes]) -> dict[str, Any]:
    """Appends the rows of `parts` that are not in the table yet. `parts`: path below the output -> the ids of its rows.
    Returns the entry of the manifest. Raises `Stopped` if the table cannot be written."""
    table = find_table(path)
    assert table is not None
    try:
        return _Append(fs, root, path, sink_of(table)).run(parts)
    except (Stopped, ConfigError):
        raise
    except Exception as error:  # the libraries have types of their own
        text = f"output.table: cannot append to {path}: {one_line(error)}; the same command continues"
        raise Stopped(text, code=ErrorCode.TABLE) from None


@dataclass
class _Append:
    fs: pafs.FileSystem
    root: str
    path: str
    sink: Sink
    state: dict[str, Any] = field(default_factory=dict)

    def run(self, parts: Mapping[str, bytes]) -> dict[str, Any]:
        place = canonical_place(self.path)
        self.name = hashlib.sha256(place.encode()).hexdigest()[:16]
        self.state = read_json(self.fs, f"{self.root}/{TABLE}/{self.name}.json") or {
            "table": place,
            "app": f"eagleray-{uuid.uuid4()}",
            "committed": -1,
            "before": None,
        }
        self._settle()
        ids = _numbered(np.frombuffer(b"".join(parts.values()), f"S{ID_BYTES}"))
        new = (ids != b"") & ~np.isin(ids, self._appended())
        if count := int(new.sum()):
            number = self.state["committed"] + 1
            self.state["before"] = self.sink.version()
            self._save()
            write_atomic(self.fs, self._keys(number), np.sort(ids[new]).tobytes())
            self.sink.commit(self._batches(parts, new), self._schema(parts), self.state["app"], number)
            self.state["committed"] = number
            self._save()
        return {"path": self.path, "rows_appended": count, "commits": self.state["committed"] + 1}

    def _settle(self) -> None:
        """Finds out if the commit was made during which an earlier run was killed."""
        number = self.state["committed"] + 1
        names = {info.base_name for info in listing(self.fs, f"{self.root}/{TABLE}")}
        if self._keys(number).rpartition("/")[2] not in names:
            return
        if self.sink.is_committed(self.state["app"], number, self.state["before"]):
            self.state["committed"] = number
            self._save()
        else:
            remove(self.fs, self._keys(number))

    def _appended(self) -> Ids:
        """The ids of the rows that are in the table."""
        found = []
        for number in range(self.state["committed"] + 1):
            with self.fs.open_input_stream(self._keys(number)) as stream:
                found.append(np.frombuffer(stream.read(), f"S{ID_BYTES}"))
        return np.concatenate(found) if found else np.array([], f"S{ID_BYTES}")

    def _keys(self, number: int) -> str:
        return f"{self.root}/{TABLE}/{self.name}-{number:05d}.keys"

    def _save(self) -> None:
        write_atomic(self.fs, f"{self.root}/{TABLE}/{self.name}.json", orjson.dumps(self.state))

    def _schema(self, parts: Mapping[str, bytes]) -> pa.Schema:
        with self.fs.open_input_file(f"{self.root}/{next(iter(parts))}") as file:
            return pq.read_schema(file)

    def _batches(self, parts: Mapping[str, bytes], new: npt.NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
        at = 0
        for path in parts:
            with self.fs.open_input_file(f"{self.root}/{path}") as file:
                for batch in pq.ParquetFile(file).iter_batches():
                    some = batch.filter(pa.array(new[at : at + batch.num_rows]))
                    at += batch.num_rows
                    if some.num_rows:
                        yield some


def _numbered(ids: Ids) -> Ids:
    """Ids that tell rows with one request apart: the first keeps its id, later ones get one with their number."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ids) else np.array([], np.int64)
    number = np.empty(len(ids), np.int64)
    number[order] = np.arange(len(ids)) - np.repeat(starts, np.diff(np.r_[starts, len(ids)]))
    found = ids.copy()
    for at in np.flatnonzero((number > 0) & (ids != b"")).tolist():
        found[at] = hashlib.sha256(b"%b %d" % (ids[at], number[at])).digest()[:ID_BYTES]
    return found


def clear_tables(fs: pafs.FileSystem, root: str) -> None:
    """Forgets the rows that were appended, so that the next run appends its rows again."""
    for info in listing(fs, f"{root}/{TABLE}"):
        if is_table_file(info.base_name):
            remove(fs, info.path)
