"""Writes the request files of new batches: reads rows and starts a new file at each limit of the batch API."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from engines.errors import EngineError, invalid
from engines.remote.batch.factory import check_batch_task, encoded
from pipeline.dataset.occurrences import Occurrences
from pipeline.dataset.reader import ReadSplit, RowReader, SplitSummary
from pipeline.executors.batch.session import BatchSession
from pipeline.executors.batch.store import Batch, BatchFileWriter
from pipeline.executors.cost_budget import CostBudget, check_model
from pipeline.executors.requests import read_split, request_of
from pipeline.executors.row_counter import RowCounter
from pipeline.storage.exact_json import loads
from pipeline.storage.ledger_index import DedupFilter, Index


class BatchPlanner:
    """Writes the batches of one round. A batch holds rows of one model."""

    def __init__(
        self,
        session: BatchSession,
        row_reader: RowReader,
        budget: CostBudget | None,
        advance: Callable[[Batch], object],  # takes a batch that is written its next steps
        refuse: Callable[[bytes, str, EngineError], None],  # records a row that cannot be asked
        check_interrupt: Callable[[], None],
        row_counter: RowCounter,
    ) -> None:
        self.row_counter = row_counter
        self.session, self.row_reader, self.budget = session, row_reader, budget
        self.advance, self.refuse, self.check_interrupt = advance, refuse, check_interrupt
        self.round = session.next_round
        self.writers: dict[str, BatchFileWriter] = {}  # model -> its batch
        self.rows = 0  # requests that are in new batches, or refused
        self.left = 0  # requests that the budget has no room for
        self.summaries: dict[int, SplitSummary] = {}

    def write(self, splits: list[ReadSplit], known: Index) -> None:
        """Writes batches of all rows that are neither in `known` nor under way."""
        under_way, seen, occurrences = DedupFilter(), DedupFilter(), Occurrences()
        for batch in self.session.store.open:
            under_way.add(self.session.store.keys(batch)["key"].cast(pa.binary(32)))
        fail = self.session.config.dataset.on_bad_input == "fail"
        for split in splits:
            summary = self.summaries[split.number] = SplitSummary()
            for table in read_split(split, self.row_reader, known, fail, summary, occurrences):
                self.check_interrupt()
                duplicates = table["key"].filter(pa.array(~seen.add(table["key"])))
                self.row_counter.read((), duplicates.to_pylist())
                fresh = table.filter(pa.array(under_way.add(table["key"])))
                for row in zip(*(fresh[name].to_pylist() for name in ("key", "id", "request")), strict=True):
                    self._add(*row)
        for writer in self.writers.values():
            self.advance(writer.close())

    def _add(self, key: bytes, id: str, request: bytes) -> None:
        cost = self.budget.max_cost(request) if self.budget else 0.0
        if self.budget and not self.budget.fits(cost):
            self.left += 1
            return
        self.rows += 1
        try:
            values = loads(request)
            model, line = self._line(key, values)
        except EngineError as error:
            self.refuse(key, id, error)
            return
        writer = self._writer(model, len(line))
        writer.add(key, id, line, values.get("generation"))
        writer.batch.estimate += cost
        if self.budget:
            self.budget.reserved += cost

    def _writer(self, model: str, size: int) -> BatchFileWriter:
        """The writer of a batch that has room for a request of `size` bytes."""
        session, writer = self.session, self.writers.get(model)
        if writer and (writer.batch.rows == session.max_rows or writer.batch.size + size > session.max_bytes):
            self.advance(self.writers.pop(model).close())
            writer = None
        if writer is None:
            number = len(session.store.batches) + len(self.writers) + 1
            name = f"eagleray-{secrets.token_hex(4)}-{number:05d}"
            batch = Batch(name, model, self.round, session.first_round, session.settings)
            writer = self.writers[model] = BatchFileWriter(session.store, batch)
        return writer

    def _line(self, key: bytes, values: dict[str, Any]) -> tuple[str, bytes]:
        """The model of a request, and its line in the file of requests. Raises `EngineError`."""
        session = self.session
        request = request_of(values, session.generation, key)
        check_batch_task(session.config.engine, request.task)
        if request.task != session.config.task:
            raise invalid(f"the batches of this run have task={session.config.task}, this row has task={request.task}")
        if self.budget is not None:
            check_model(request, session.config.engine)
        body = session.engine.body(session.engine.load_media_sync(session.engine.prepared(request)))
        line = encoded(session.wire, key.hex(), body, session.engine)
        if len(line) > session.max_bytes:
            raise EngineError("invalid_input", f"the request has {len(line):,} bytes, a batch holds {session.max_bytes:,}")
        return str(body.get("model")), line
