"""Brings the results of batches into the ledger.

A row that comes back without an answer (expired, cancelled, an error that may pass) gets no record: the next round asks it
again with everything else that is missing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from engines.errors import EngineError, Failure
from engines.remote.batch.client import BatchState, BatchStatus
from engines.structured import first_schema_error
from engines.text import one_line
from engines.types import Completion
from engines.usage import Usage
from pipeline.executors.batch.session import BatchSession
from pipeline.executors.batch.store import Batch
from pipeline.monitor.status import RunStatus
from pipeline.output.cost import BATCH_SEGMENT_PREFIX
from pipeline.storage.exact_json import loads
from pipeline.storage.ledger import Record, write_segment
from pipeline.storage.ledger_index import read_index

# The most answers, and about the most bytes, in one segment.
SEGMENT_ROWS, SEGMENT_BYTES = 5_000, 32 << 20


@dataclass(slots=True)
class _Counts:
    """The lines of a file of results."""

    lines: int = 0
    answers: int = 0  # lines without an error
    ours: int = 0  # lines for rows of the batch


class BatchCollector:
    """Reads results and writes records; `status` counts them."""

    def __init__(self, session: BatchSession) -> None:
        self.session, self.store = session, session.store
        self.status = RunStatus()

    def fetch(self, batch: Batch, status: BatchStatus) -> None:
        """Brings all results of an ended batch into the ledger. Raises `EngineError`; the results before it are kept."""
        left, found = self.unanswered(batch), _Counts()
        if not batch.fetched_at:
            batch.fetched_at = time.time()
            self.store.save(batch)
        for records in _portions(self._records(batch, status, left, found)):
            self.commit(records)
        whole = status.status is BatchState.COMPLETED
        short = found.answers < status.done if status.counts_rows else whole and not status.outputs
        if short and status.status is not BatchState.FAILED:
            expected = f"of {status.done:,} answers" if status.counts_rows else "of the answers"
            raise EngineError("bad_response", f"{expected} {found.answers:,} are there so far", retryable=True)
        if found.lines and not found.ours:  # it is the batch of somebody else, taken for this one
            batch.foreign.append(str(batch.id))
            batch.id = None
            self.session.enter(batch, "submitting")
            return
        self.close_batch(batch, status, left)

    def unanswered(self, batch: Batch) -> dict[bytes, str]:
        """The keys and ids of a batch's rows that the ledger has no answer to."""
        table = self.store.keys(batch)
        keys = table["key"].cast(pa.binary(32))
        known = read_index(self.session.fs, self.session.root).only(failed_count_as_answered=False)
        table = table.filter(pa.array(known.find(keys) < 0))
        return dict(zip(table["key"].to_pylist(), table["id"].to_pylist(), strict=True))

    # -- the results ---------------------------------------------------------------------------------------------------

    def _records(self, batch: Batch, status: BatchStatus, left: dict[bytes, str], found: _Counts) -> Iterator[Record]:
        """The records of results for the rows in `left`. Rows with a final result are taken out of `left`."""
        table = self.store.keys(batch)
        keys = table["key"].to_pylist()
        params = table["generation"].to_pylist() if "generation" in table.column_names else []
        own = dict(zip(keys, params, strict=False))
        keys = set(keys)
        batch.failed = 0
        for custom_id, outcome in self.session.wire.results(status):
            found.lines += 1
            found.answers += not isinstance(outcome, EngineError)
            try:
                key = bytes.fromhex(custom_id)
            except ValueError:
                continue
            found.ours += key in keys
            id = left.get(key)
            if id is None:  # not a row of this batch, or one that has its answer
                continue
            record = self._record(batch, key, id, outcome, own.get(key))
            if record is None:
                continue
            if not record.superseded:
                del left[key]
                batch.failed += record.completion.error is not None
            yield record

    def _record(self, batch: Batch, key: bytes, id: str, outcome: Any, own: str | None) -> Record | None:
        """The record of one result: an answer, a failure, or a superseded try. None if the row is asked again and this try
        cost nothing. `own` are the row's own generation parameters, as JSON."""
        engine = self.session.engine
        # An answer that cannot be read is paid, and its usage is not known.
        used, answered = Usage(known=isinstance(outcome, EngineError)), None
        try:
            generation = self.session.generation.override(loads((own or "{}").encode()))
            completion = engine.read(outcome, generation.n, batch.model)
            used, answered = completion.usage, completion.model
            if wrong := first_schema_error(completion, generation, batch.tries - 1):
                raise wrong
        except (EngineError, KeyError, TypeError, ValueError, AttributeError) as raised:
            return self._failed_try(batch, key, id, _as_engine_error(raised), used, answered)
        completion.cost_usd = self._cost(batch, used, answered)
        completion.engine, completion.model = engine.kind, completion.model or batch.model
        completion.attempts = batch.tries
        return Record(key, id, completion, time.time())

    def _failed_try(
        self, batch: Batch, key: bytes, id: str, error: EngineError, used: Usage, answered: str | None
    ) -> Record | None:
        record = self.failure(key, id, error)
        # All reads of a batch's results give its failures the same time, so that none counts twice.
        record.done_at = batch.fetched_at
        record.completion.usage = used = error.usage or used
        record.completion.cost_usd = cost = self._cost(batch, used, answered)
        if not error.retryable or self._is_last(batch):
            record.completion.attempts = batch.tries
            return record
        if cost == 0:
            return None
        record.completion.attempts, record.superseded = 0, True  # the next try counts this attempt
        return record

    def _cost(self, batch: Batch, usage: Usage, answered: str | None) -> float | None:
        return self.session.engine.cost(usage, batch.model, answered, batch=True)

    # -- the end of a batch --------------------------------------------------------------------------------------------

    def close_batch(self, batch: Batch, status: BatchStatus, left: dict[bytes, str]) -> None:
        """Ends a batch. Rows in `left` have no answer: they are asked again, or recorded as failed."""
        reasons = self._line_errors(batch, status)
        last = self._reason_for_all(batch, status, len(left))
        failed = [self.failure(key, id, error) for key, id in left.items() if (error := reasons.get(key) or last)]
        for record in failed:
            record.completion.attempts = batch.tries
        self.commit(failed)
        batch.again = len(left) - len(failed)
        batch.failed += len(failed)
        batch.answered = batch.rows - batch.failed - batch.again
        batch.ended = str(status.status)
        self.session.enter(batch, "fetched")
        self.store.drop_files(batch)

    def _line_errors(self, batch: Batch, status: BatchStatus) -> dict[bytes, EngineError]:
        """The rows that made the provider refuse the whole batch."""
        errors: dict[bytes, EngineError] = {}
        if status.lines:
            keys = self.store.keys(batch)["key"].to_pylist()
            for line, reason in status.lines.items():
                if 0 < line <= len(keys):
                    errors[keys[line - 1]] = EngineError("bad_request", reason)
        return errors

    def _reason_for_all(self, batch: Batch, status: BatchStatus, left: int) -> EngineError | None:
        """Why all rows without an answer fail; None if they are asked again."""
        failed = status.status is BatchState.FAILED and not status.lines and left == batch.rows
        if batch.cancelled:
            return EngineError("cancelled", "its batch was cancelled", retryable=True)
        if failed and not self._live_follows:
            return EngineError("bad_request", status.error or "the batch failed")
        if self._is_last(batch):
            return EngineError("bad_response", f"no answer to it came back, {batch.tries} times", retryable=True)
        return None

    @property
    def _live_follows(self) -> bool:
        return self.session.config.run.batch_fallback == "live"

    def _is_last(self, batch: Batch) -> bool:
        """True if the batch's rows are not asked again, neither in another batch nor live."""
        return batch.cancelled or (not self._live_follows and batch.tries > self.session.config.engine.max_retries)

    # -- records -------------------------------------------------------------------------------------------------------

    def failure(self, key: bytes, id: str, error: EngineError) -> Record:
        """The record of a row that failed."""
        session = self.session
        text = session.wire.client.clean(" ".join(str(error).split()))[:500]
        failure = dataclasses.replace(Failure.of(error), message=text)
        completion = Completion(error=failure, engine=session.engine.kind, model=session.config.engine.model, attempts=0)
        return Record(key, id, completion, time.time())

    def commit(self, records: list[Record]) -> None:
        """Makes records durable and counts them."""
        if not records:
            return
        write_segment(self.session.fs, self.session.root, BATCH_SEGMENT_PREFIX, records)
        status = self.status
        for record in records:
            completion = record.completion
            status.input_tokens += completion.usage.input
            status.output_tokens += completion.usage.output
            status.cost_usd += completion.cost_usd or 0.0
            status.cost_unknown += completion.cost_usd is None
            if record.superseded:
                continue
            if completion.error is None:
                status.done += 1
            else:
                status.failed += 1
                status.errors[completion.error.type] += 1
                status.first_errors.setdefault(completion.error.type, f"{record.id}: {completion.error.message}")


def _as_engine_error(error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        return error
    reason = f"the answer is not as documented ({type(error).__name__}: {one_line(error)})"
    return EngineError("bad_response", reason, retryable=True)


def _portions(records: Iterator[Record]) -> Iterator[list[Record]]:
    """The records, in lists that are fit for a segment."""
    portion: list[Record] = []
    size = 0
    for record in records:
        portion.append(record)
        size += len(record.completion.text or "") + 200
        if len(portion) == SEGMENT_ROWS or size > SEGMENT_BYTES:
            yield portion
            portion, size = [], 0
    yield portion
