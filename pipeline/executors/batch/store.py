"""The files of provider batches under `_batches/`."""

from __future__ import annotations

import dataclasses
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engines.errors import ConfigError
from engines.remote.batch.client import BatchStatus, Requests
from engines.text import one_line
from engines.types import BYTES_PER_TOKEN
from pipeline.storage.exact_json import dumps
from pipeline.storage.filesystem import exists, listing, remove, write_atomic
from pipeline.storage.output_files import BATCHES, is_batch_file, is_temporary


def damaged_batch(path: str, error: Exception, id: str | None = None) -> ConfigError:
    known = f" (batch {id})" if id else ""
    return ConfigError(
        f"{path} cannot be read: {one_line(error)}. It belongs to a batch that may be at the provider and paid{known}. "
        f"Restore the file. If you do without that batch, delete {path.rpartition('.')[0]}.*: its rows are asked again"
    )


# State -> the step that follows, for messages about a step that failed.
NEXT_STEP = {"spooled": "uploaded", "uploaded": "submitted", "submitting": "submitted", "submitted": "fetched"}


@dataclass(slots=True)
class Batch:
    """One batch, as in `_batches/<name>.json`."""

    name: str
    model: str
    round: int
    first: int  # the first round of the run that made this batch
    settings: dict[str, Any]  # everything that changes its answers
    rows: int = 0
    size: int = 0  # bytes
    estimate: float = 0.0  # the most that it may cost, in US$; 0 without a budget
    state: str = "spooled"
    file: str | None = None  # its id at the provider
    id: str | None = None  # the batch's id at the provider
    submitting_at: float = 0.0  # of the first try to submit; the provider has no older batch of ours
    tried_at: float = 0.0  # of the last try
    submission: int = 1  # the number of the submission; each has an idempotency key of its own
    guessed: bool = False  # `id` may be a batch of another program, because nothing at the provider names ours
    fetched_at: float = 0.0  # when its results were first read; all its failed rows get this time, so none counts twice
    incomplete_reads: int = 0  # reads of results with fewer answers than the provider counts
    foreign: list[str] = field(default_factory=list)  # ids that `find` passes over: of other programs, or failed
    cancelled: bool = False  # by the user: its rows are not asked again in this run
    answered: int = 0
    failed: int = 0  # recorded as failed
    again: int = 0  # rows without an answer, which are asked again
    ended: str | None = None  # the last state at the provider
    status: BatchStatus | None = None  # the last answer of the provider; not saved

    @property
    def open(self) -> bool:
        return self.state != "fetched"

    @property
    def tries(self) -> int:
        """The number of times its rows have been asked, with this one."""
        return self.round - self.first + 1

    @property
    def tokens(self) -> int:
        return int(self.size / BYTES_PER_TOKEN)

    def give_up_submission(self) -> None:
        """The provider has no batch for the last submission, or one that is of no use: the next is another submission."""
        if self.id is not None:
            self.foreign.append(self.id)
        self.id, self.guessed, self.fetched_at, self.incomplete_reads = None, False, 0.0, 0
        self.submission += 1


@dataclass
class BatchStore:
    """All batches of one output directory. Raises `ConfigError` for a damaged file."""

    fs: pafs.FileSystem
    root: str
    batches: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        for info in sorted(
            listing(self.fs, f"{self.root}/{BATCHES}"), key=lambda info: info.path.rsplit("-", 1)[-1]
        ):  # by number
            if is_batch_file(info.base_name) and info.path.endswith(".json"):
                with self.fs.open_input_stream(info.path) as file:
                    self.batches.append(_read_batch(info.path, file.read()))

    def path(self, batch: Batch, kind: str) -> str:
        return f"{self.root}/{BATCHES}/{batch.name}.{kind}"

    def save(self, batch: Batch) -> None:
        values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "status"}
        write_atomic(self.fs, self.path(batch, "json"), orjson.dumps(values, option=orjson.OPT_INDENT_2))

    def keys(self, batch: Batch) -> pa.Table:
        path = self.path(batch, "parquet")
        try:
            with self.fs.open_input_file(path) as file:
                table = pq.read_table(file)
            if {"key", "id"} <= set(table.column_names):
                return table
            raise pa.ArrowInvalid("it has not the columns of one of ours")
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise damaged_batch(path, error, batch.id) from None

    def requests(self, batch: Batch) -> Requests:
        path = self.path(batch, "jsonl")
        return Requests(batch.name, batch.model, batch.rows, batch.size, lambda: self._open(path), batch.submission)

    def _open(self, path: str) -> BinaryIO:
        # Buffered, because Arrow's files have no `readline`.
        return io.BufferedReader(self.fs.open_input_file(path), 1 << 20)

    def sweep(self) -> None:
        """Deletes files of requests that no open batch needs: a killed run left them."""
        needed = {f"{batch.name}.{kind}" for batch in self.open for kind in ("jsonl", "parquet")}
        for info in listing(self.fs, f"{self.root}/{BATCHES}"):
            name = info.base_name
            ours = is_temporary(name) or (is_batch_file(name) and not name.endswith(".json"))
            if info.is_file and ours and name not in needed:
                remove(self.fs, info.path)

    def forget(self, batch: Batch) -> None:
        """Removes a batch that is not at the provider. Its rows are asked again."""
        self.batches.remove(batch)
        remove(self.fs, self.path(batch, "json"))
        self.drop_files(batch)

    def drop_files(self, batch: Batch) -> None:
        """Deletes the files of requests and keys, which are not needed after the results."""
        for kind in ("jsonl", "parquet"):
            if exists(self.fs, self.path(batch, kind)):
                remove(self.fs, self.path(batch, kind))

    def summary(self) -> list[dict[str, Any]]:
        """The entries of the manifest."""
        names = ("name", "id", "model", "round", "rows", "answered", "failed", "again", "ended")
        return [{name: getattr(batch, name) for name in names} for batch in self.batches]

    @property
    def open(self) -> list[Batch]:
        return [batch for batch in self.batches if batch.open]


def _read_batch(path: str, data: bytes) -> Batch:
    """Raises `ConfigError` for a damaged file. Ignoring the batch would mean to pay for its rows twice."""
    try:
        batch = Batch(**orjson.loads(data))
        state = batch.state == "fetched" or batch.state in NEXT_STEP
        numbers = all(isinstance(value, int) for value in (batch.round, batch.first, batch.rows, batch.size))
        if not (state and numbers and isinstance(batch.settings, dict)):
            raise ValueError("its values are not those of a batch")
    except (ValueError, TypeError) as error:
        raise damaged_batch(path, error) from None
    return batch


class BatchFileWriter:
    """Writes the files of one new batch."""

    def __init__(self, store: BatchStore, batch: Batch) -> None:
        self.store, self.batch = store, batch
        store.fs.create_dir(f"{store.root}/{BATCHES}", recursive=True)
        stream = store.fs.open_output_stream(store.path(batch, "jsonl"), compression=None)
        self.file = io.BufferedWriter(stream, 1 << 20)
        self.keys: list[bytes] = []
        self.ids: list[str] = []
        self.own: list[str | None] = []  # the row's own generation parameters, as JSON, to check its answer against

    def add(self, key: bytes, id: str, line: bytes, own: dict[str, Any] | None) -> None:
        self.file.write(line)
        self.keys.append(key)
        self.ids.append(id)
        self.own.append(dumps(own).decode() if own else None)
        self.batch.rows += 1
        self.batch.size += len(line)

    def close(self) -> Batch:
        """Makes the requests durable, then their keys, then the batch."""
        self.file.close()
        if isinstance(self.store.fs, pafs.LocalFileSystem):
            with Path(self.store.path(self.batch, "jsonl")).open("rb") as file:
                os.fsync(file.fileno())
        sink = io.BytesIO()
        columns = {"key": pa.array(self.keys, pa.binary(32)), "id": pa.array(self.ids)}
        pq.write_table(pa.table({**columns, "generation": pa.array(self.own, pa.string())}), sink)
        write_atomic(self.store.fs, self.store.path(self.batch, "parquet"), sink.getvalue())
        self.store.save(self.batch)
        self.store.batches.append(self.batch)
        return self.batch
