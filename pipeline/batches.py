"""`run.mode=batch`: rows go to the provider's batch API and come back into the same ledger as those of a live run.

Each batch has files under `_batches/`: its requests, the keys of these, and how far it is. Every step is written down
before the next, so that a run may be killed anywhere, or go away for a day:

    spooled -> uploaded -> submitting -> submitted -> fetched

Only between the last but two may something have happened that was not written down; there the provider is asked first.
A row that came back without an answer (expired, cancelled, an error that passes) is simply not in the ledger, so the
next round asks it again with everything else that is missing.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from rich.console import Console

from engines.base import engine_class
from engines.batch.connect import encoded, no_batch_api, wire_of
from engines.batch.wire import BatchState, BatchStatus, Requests
from engines.types import Completion, EngineError, Failure, Request
from pipeline.config import Config
from pipeline.crew import Interrupted, Stopped
from pipeline.feed import Interpreter, Piece, Status, Summary, read_piece
from pipeline.fs import exists, listing, write_atomic
from pipeline.ledger import Index, Record, SeenKeys, read_index, write_segment
from pipeline.lossless import loads
from pipeline.progress import RunProgress

BATCHES = "_batches"
# The names of segments made of batches begin so: their rows cost the price of batches.
WRITER = "batch"

GO_ON = "batches under way go on at the provider, the same command fetches them (eagleray batch cancel ends them)"

# Answers on their way into one segment.
SEGMENT_ROWS, SEGMENT_BYTES = 5_000, 32 << 20
# A poll comes after at least so long, and later each time that nothing has changed.
POLL_FIRST_S, POLL_FACTOR = 1.0, 1.5
# Bytes of a request for each token of it, where a limit of queued tokens must be kept.
BYTES_PER_TOKEN = 4


@dataclass(slots=True)
class Batch:
    """One batch, as it stands in `_batches/<name>.json`."""

    name: str
    model: str
    round: int  # 1: its rows are asked for the first time
    rows: int = 0
    size: int = 0  # bytes
    state: str = "spooled"
    file: str | None = None  # its id at the provider
    id: str | None = None  # likewise
    submitting_at: float = 0.0
    answered: int = 0
    failed: int = 0  # for good
    again: int = 0  # without an answer yet
    ended: str | None = None  # the provider's last word
    status: BatchStatus | None = None  # as the provider last told; not written down

    @property
    def open(self) -> bool:
        return self.state != "fetched"

    @property
    def tokens(self) -> int:
        return self.size // BYTES_PER_TOKEN


@dataclass
class Book:
    """All batches of one output directory."""

    fs: pafs.FileSystem
    root: str
    batches: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        for info in sorted(
            listing(self.fs, f"{self.root}/{BATCHES}"), key=lambda info: info.path.rsplit("-", 1)[-1]
        ):  # by number
            if info.path.endswith(".json"):
                with self.fs.open_input_stream(info.path) as file:
                    self.batches.append(Batch(**orjson.loads(file.read())))

    def path(self, batch: Batch, kind: str) -> str:
        return f"{self.root}/{BATCHES}/{batch.name}.{kind}"

    def save(self, batch: Batch) -> None:
        values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "status"}
        write_atomic(self.fs, self.path(batch, "json"), orjson.dumps(values, option=orjson.OPT_INDENT_2))

    def keys(self, batch: Batch) -> pa.Table:
        with self.fs.open_input_file(self.path(batch, "parquet")) as file:
            return pq.read_table(file)

    def requests(self, batch: Batch) -> Requests:
        path = self.path(batch, "jsonl")
        return Requests(batch.name, batch.model, batch.rows, batch.size, lambda: self._open(path))

    def _open(self, path: str) -> BinaryIO:
        # Buffered: Arrow's own files have no `readline`, by which lines are gone through.
        return io.BufferedReader(self.fs.open_input_file(path), 1 << 20)

    def drop_files(self, batch: Batch) -> None:
        """The requests, a copy of the dataset, once nobody needs them."""
        for kind in ("jsonl", "parquet"):
            if exists(self.fs, self.path(batch, kind)):
                self.fs.delete_file(self.path(batch, kind))

    def told(self) -> list[dict[str, Any]]:
        """For the manifest: what each came to."""
        names = ("name", "id", "model", "round", "rows", "answered", "failed", "again", "ended")
        return [{name: getattr(batch, name) for name in names} for batch in self.batches]

    @property
    def open(self) -> list[Batch]:
        return [batch for batch in self.batches if batch.open]


class _Spool:
    """A batch's requests on their way to disk."""

    def __init__(self, book: Book, batch: Batch) -> None:
        self.book, self.batch = book, batch
        book.fs.create_dir(f"{book.root}/{BATCHES}", recursive=True)
        stream = book.fs.open_output_stream(book.path(batch, "jsonl"), compression=None)
        self.file = io.BufferedWriter(stream, 1 << 20)
        self.keys: list[bytes] = []
        self.ids: list[str] = []

    def add(self, key: bytes, id: str, line: bytes) -> None:
        self.file.write(line)
        self.keys.append(key)
        self.ids.append(id)
        self.batch.rows += 1
        self.batch.size += len(line)

    def close(self) -> Batch:
        """Makes it durable: the requests, then their keys, then the batch."""
        self.file.close()
        if isinstance(self.book.fs, pafs.LocalFileSystem):
            with Path(self.book.path(self.batch, "jsonl")).open("rb") as file:
                os.fsync(file.fileno())
        sink = io.BytesIO()
        pq.write_table(pa.table({"key": pa.array(self.keys, pa.binary(32)), "id": pa.array(self.ids)}), sink)
        write_atomic(self.book.fs, self.book.path(self.batch, "parquet"), sink.getvalue())
        self.book.save(self.batch)
        self.book.batches.append(self.batch)
        return self.batch


class BatchRun:
    """The rows of one output directory on their way through batches. Raises `ConfigError` and `Stopped`."""

    def __init__(self, config: Config, fs: pafs.FileSystem, root: str, interpreter: Interpreter) -> None:
        self.config, self.fs, self.root, self.interpreter = config, fs, root, interpreter
        if not config.engine.provider.get("batch"):
            raise no_batch_api(config.engine.kind)
        self.engine, self.wire = wire_of(engine_class(config.engine.kind, config.engine.provider)(config.engine))
        self.engine.check(config.params())
        limits = self.engine.provider.batch
        self.most_rows = min(limits.get("rows") or self.wire.most_rows, self.wire.most_rows)
        self.most_bytes = min(limits.get("bytes") or self.wire.most_bytes, self.wire.most_bytes)
        self.queued_tokens: int | None = limits.get("queued_tokens")
        if self.queued_tokens:
            self.most_bytes = min(self.most_bytes, self.queued_tokens * BYTES_PER_TOKEN)
        self.book = Book(fs, root)
        # A run that goes on counts its rounds on; a new one begins anew.
        rounds = [batch.round for batch in self.book.batches]
        self.first_round = min((b.round for b in self.book.open), default=max(rounds, default=0) + 1)
        self.resumed = bool(self.book.open)
        self.full_until = 0.0  # the provider's queue is full, at least until then
        self.full_with = 0  # batches in it when it was found full
        self.trouble, self.trouble_since = "", math.inf
        self.status = Status()

    def ask(
        self,
        pieces: list[Piece],
        console: Console,
        interrupts: list[int],
        why_stop: Callable[[Status], str | None],
        wait: bool,
    ) -> dict[int, Summary] | None:
        """Takes all rows through batches; without `wait`, as far as it goes now, and None where that is not to the end.

        With `run.batch_fallback=live` the end is that of the first round. Also raises `Interrupted`.
        """
        failed_too = self.resumed or not wait or not self.config.run.retry_failed
        limits = self.config.run
        with RunProgress(console, limits.progress_s) as progress:
            while True:
                rows, summaries = self.spool(pieces, read_index(self.fs, self.root).only(failed_too=failed_too))
                if not rows and not self.book.open:
                    return summaries
                failed_too = True
                pause = POLL_FIRST_S
                while self.book.open:
                    moved = self.step()
                    progress.show(self.shown())
                    if reason := why_stop(self.status):
                        raise Stopped(f"{reason}; {GO_ON}")
                    if time.monotonic() > self.trouble_since + limits.max_outage_s:
                        raise Stopped(f"{self.trouble}; {GO_ON}")
                    pause = POLL_FIRST_S if moved else min(pause * POLL_FACTOR, limits.batch_poll_s)
                    until = time.monotonic() + (pause if self.book.open else 0)
                    if not moved and not wait:
                        return None
                    while time.monotonic() < until or interrupts:
                        if interrupts:
                            raise Interrupted(f"interrupted; {GO_ON}")
                        progress.show(self.shown())
                        time.sleep(min(0.2, max(0.0, until - time.monotonic())))
                if limits.batch_fallback == "live":
                    return summaries

    def close(self) -> None:
        self.wire.client.close()
        self.engine.close()

    # -- rows to batches ----------------------------------------------------------------------------------------------

    def spool(self, pieces: list[Piece], known: Index) -> tuple[int, dict[int, Summary]]:
        """Batches of all rows that are neither in `known` nor under way; how many, and what reading found."""
        seen = SeenKeys()
        for batch in self.book.open:
            seen.add(self.book.keys(batch)["key"].cast(pa.binary(32)))
        round = max((b.round for b in self.book.batches if b.round >= self.first_round), default=self.first_round - 1) + 1
        spools: dict[str, _Spool] = {}
        refused: list[Record] = []
        summaries: dict[int, Summary] = {}
        rows = 0
        for piece in pieces:
            summary = summaries[piece.number] = Summary()
            fail = self.config.dataset.on_bad_input == "fail"
            for table in read_piece(piece, self.interpreter, known, fail, summary):
                fresh = table.filter(pa.array(seen.add(table["key"])))
                for key, id, request in zip(*(fresh[name].to_pylist() for name in ("key", "id", "request")), strict=True):
                    rows += 1
                    try:
                        model, line = self._line(key, loads(request))
                    except EngineError as error:
                        refused.append(self._failed(key, id, error))
                        continue
                    spool = spools.get(model)
                    if spool and (spool.batch.rows == self.most_rows or spool.batch.size + len(line) > self.most_bytes):
                        self._advance(spools.pop(model).close())
                        spool = None
                    if spool is None:
                        name = f"eagleray-{secrets.token_hex(4)}-{len(self.book.batches) + len(spools) + 1:05d}"
                        spool = spools[model] = _Spool(self.book, Batch(name, model, round))
                    spool.add(key, id, line)
        for spool in spools.values():
            self._advance(spool.close())
        self._commit(refused)
        self._account(summaries)
        return rows, summaries

    def _line(self, key: bytes, values: dict[str, Any]) -> tuple[str, bytes]:
        generation = self.config.params().override(values.get("generation") or {})
        request = Request(values["messages"], generation, values.get("model"), values.get("adapter"), key.hex())
        body = self.engine.body(self.engine.prepared(request))
        line = encoded(self.wire, key.hex(), body, self.engine)
        if len(line) > self.most_bytes:
            raise EngineError("invalid_input", f"the request has {len(line):,} bytes, a batch holds {self.most_bytes:,}")
        return str(body.get("model")), line

    def _account(self, summaries: dict[int, Summary]) -> None:
        status, all = self.status, summaries.values()
        status.read, status.invalid = sum(s.rows for s in all), sum(s.invalid for s in all)
        status.fed = True

    # -- one step at a time -------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Takes every open batch as far as it goes now; whether any of them moved."""
        moved = [self._advance(batch) for batch in self.book.open]
        return any(moved)

    def _advance(self, batch: Batch) -> bool:
        before = batch.state
        try:
            if batch.state == "spooled":
                batch.file = self.wire.upload(self.book.requests(batch))
                self._now(batch, "uploaded")
            if batch.state == "uploaded" and self._room(batch):
                batch.submitting_at = time.time()
                self._now(batch, "submitting")
                self._submit(batch)
            elif batch.state == "submitting":  # whoever was here before may have come as far as the provider
                known = {other.id for other in self.book.batches if other.id}
                batch.id = self.wire.find(self.book.requests(batch), batch.file, batch.submitting_at, known)
                if batch.id is None:
                    self._submit(batch)
                else:
                    self._now(batch, "submitted")
            if batch.state == "submitted":
                self._poll(batch)
        except EngineError as error:
            if error.type == "auth":
                raise Stopped(f"the provider refuses the key ({error}); the same command goes on from here") from None
            if not error.retryable:
                gone = error.type == "not_found" and batch.state == "submitted"
                hint = (
                    f"; if it is gone for good, delete {self.book.path(batch, 'json')}: its rows go again" if gone else ""
                )
                raise Stopped(f"batch {batch.id or batch.name} cannot be {_NEXT[batch.state]}: {error}{hint}") from None
            # Asked again the next time; said if it lasts.
            self.trouble, self.trouble_since = str(error), min(self.trouble_since, time.monotonic())
            return False
        self.trouble, self.trouble_since = "", math.inf
        return batch.state != before

    def _now(self, batch: Batch, state: str) -> None:
        batch.state = state
        self.book.save(batch)

    def _room(self, batch: Batch) -> bool:
        """Whether the provider's queue may take another batch."""
        queued = [b for b in self.book.open if b.state in ("submitting", "submitted")]
        if time.monotonic() < self.full_until and len(queued) >= self.full_with:
            return False
        limit = self.queued_tokens
        return not limit or not queued or batch.tokens + sum(b.tokens for b in queued) <= limit

    def _submit(self, batch: Batch) -> None:
        try:
            batch.id = self.wire.submit(self.book.requests(batch), batch.file)
        except EngineError as error:
            if error.type != "rate_limit":
                raise
            self._full(batch)  # that much is sure: it made none
            return
        self._now(batch, "submitted")

    def _full(self, batch: Batch) -> None:
        batch.id = None
        self._now(batch, "uploaded")
        self.full_until = time.monotonic() + self.config.run.batch_poll_s
        self.full_with = len([b for b in self.book.open if b.state == "submitted"])

    def _poll(self, batch: Batch) -> None:
        status = batch.status = self.wire.status(str(batch.id))
        if status.queue_full:
            self._full(batch)
        elif status.status is not BatchState.IN_PROGRESS:
            self._fetch(batch, status)

    # -- batches to rows ----------------------------------------------------------------------------------------------

    def _fetch(self, batch: Batch, status: BatchStatus) -> None:
        """Everything that an ended batch came to, into the ledger."""
        table = self.book.keys(batch)
        keys, ids = table["key"].to_pylist(), table["id"].to_pylist()
        left: dict[bytes, str] = dict(zip(keys, ids, strict=True))
        last = batch.round - self.first_round >= self.config.engine.max_retries
        batch.answered = batch.failed = batch.again = 0
        for records in _portions(self._records(batch, status, left, last)):
            self._commit(records)
        for line, reason in status.lines.items():  # the provider took none of them, because of these
            if line <= len(keys) and (id := left.pop(keys[line - 1], None)):
                self._commit([self._failed(keys[line - 1], id, EngineError("bad_request", reason))])
                batch.failed += 1
        hopeless = status.error if status.status is BatchState.FAILED and not status.lines and not batch.answered else None
        if last or hopeless:
            reason = hopeless or f"no answer to it came back, {batch.round - self.first_round + 1} times"
            error = EngineError("bad_request" if hopeless else "bad_response", reason)
            self._commit([self._failed(key, id, error) for key, id in left.items()])
            batch.failed += len(left)
            left = {}
        batch.again = len(left)
        batch.ended = str(status.status)
        self._now(batch, "fetched")
        self.book.drop_files(batch)

    def _records(self, batch: Batch, status: BatchStatus, left: dict[bytes, str], last: bool) -> Iterator[Record]:
        for custom_id, outcome in self.wire.results(status):
            try:
                key = bytes.fromhex(custom_id)
            except ValueError:
                continue
            id = left.get(key)
            if id is None:  # none of ours, or it came before
                continue
            try:
                completion = self.engine.read(outcome)
            except EngineError as error:
                if error.retryable and not last:
                    continue
                batch.failed += 1
                del left[key]
                yield self._failed(key, id, error)
                continue
            completion.engine, completion.model = self.engine.kind, completion.model or batch.model
            completion.attempts = batch.round - self.first_round + 1
            batch.answered += 1
            del left[key]
            yield Record(key, id, completion, time.time())

    def _failed(self, key: bytes, id: str, error: EngineError) -> Record:
        completion = Completion(error=Failure.of(error), engine=self.engine.kind, model=self.config.engine.model)
        return Record(key, id, completion, time.time())

    def _commit(self, records: list[Record]) -> None:
        if not records:
            return
        write_segment(self.fs, self.root, WRITER, records)
        status = self.status
        for record in records:
            completion = record.completion
            if completion.error is None:
                status.done += 1
                status.input_tokens += completion.usage.input
                status.output_tokens += completion.usage.output
            else:
                status.failed += 1
                status.errors[completion.error.type] += 1
                status.first_errors.setdefault(completion.error.type, f"{record.id}: {completion.error.message}")

    # -- what a person wants to know ----------------------------------------------------------------------------------

    def shown(self) -> Status:
        """How the run stands, with what the provider tells of the batches under way."""
        under_way = [batch for batch in self.book.open if batch.status is not None]
        done = sum(done_of(b.rows, b.status) for b in under_way)
        waiting = sum(batch.rows for batch in self.book.open)
        answered = max(0, self.status.read - self.status.invalid - waiting - self.status.done - self.status.failed)
        return dataclasses.replace(
            self.status,
            done=self.status.done + done,
            answered=answered,
            in_flight=waiting - done,
            trouble=self.trouble,
        )


# What the next step of a batch is, for an error that keeps it from there.
_NEXT = {"spooled": "uploaded", "uploaded": "submitted", "submitting": "submitted", "submitted": "fetched"}


def done_of(rows: int, status: BatchStatus | None) -> int:
    """The rows that are done, where the provider may tell shares only."""
    return min(rows, (status.done + status.failed) * rows // status.total) if status and status.total else 0


def _portions(records: Iterator[Record]) -> Iterator[list[Record]]:
    portion: list[Record] = []
    size = 0
    for record in records:
        portion.append(record)
        size += len(record.completion.text or "") + 200
        if len(portion) == SEGMENT_ROWS or size > SEGMENT_BYTES:
            yield portion
            portion, size = [], 0
    yield portion
