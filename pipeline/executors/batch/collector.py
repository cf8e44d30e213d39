"""Brings the results of batches into the ledger.

A row that comes back without an answer (expired, cancelled, a temporary error) gets no record. The next round sends it
again, with all other rows that are missing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from engines.errors import EngineError, Failure
from engines.remote.batch.client import BatchState, BatchStatus
from engines.structured import first_schema_error
from engines.text import one_line
from engines.types import Completion, Request
from engines.usage import Usage
from pipeline.executors.batch.session import BatchSession
from pipeline.executors.batch.store import Batch
from pipeline.executors.row_counter import RowCounter
from pipeline.monitor.status import RunStatus
from pipeline.storage.exact_json import loads
from pipeline.storage.ledger import BATCH_SEGMENT_PREFIX, Record, write_segment
from pipeline.storage.ledger_index import Index, read_index

# Files of results can be late: they are read again while they have fewer answers than the provider counts. After so many
# reads and seconds, the files are right and the counts are wrong.
INCOMPLETE_READS, INCOMPLETE_S = 3, 600.0
# The most answers, and about the most bytes, in one segment.
SEGMENT_ROWS, SEGMENT_BYTES = 5_000, 32 << 20


@dataclass(slots=True)
class _Counts:
    """The lines of a file of results."""

    lines: int = 0
    answers: int = 0  # lines without an error
    ours: set[bytes] = field(default_factory=set)  # keys of rows of the batch


class BatchCollector:
    """Reads results and writes records; `status` counts them."""

    def __init__(self, session: BatchSession) -> None:
        self.session, self.store = session, session.store
        self.status = RunStatus()
        self.row_counter = RowCounter(self.status, reads_ahead=True)
        self.known: Index | None = None  # the ledger at the start of the round
        self.answered: dict[str, set[bytes]] = {}  # open batch -> its rows that were answered since then
        self.refusal: EngineError | None = None  # it would hit all rows: the run stops, and they stay open

    def fetch(self, batch: Batch, status: BatchStatus) -> None:
        """Brings all results of an ended batch into the ledger. Raises `EngineError`; the results before it are kept."""
        left, found = self.unanswered(batch), _Counts()
        self.refusal = self._refusal_of_all(batch, status) or self.refusal
        if not batch.fetched_at:
            batch.fetched_at = time.time()
            self.store.save(batch)
        for records in _portions(self._records(batch, status, left, found)):
            self.commit(records, batch)
        if self._may_be_late(batch, status, found):
            batch.incomplete_reads += 1
            self.store.save(batch)
            if batch.incomplete_reads < INCOMPLETE_READS or time.time() < batch.fetched_at + INCOMPLETE_S:
                expected = f"of {status.done:,} answers" if status.counts_rows else "of the answers"
                raise EngineError("bad_response", f"{expected} {found.answers:,} are there so far", retryable=True)
        if found.ours:
            batch.guessed = False
        elif found.lines and not self.session.wire.names_batches:  # a batch of another program was taken for this one
            batch.give_up_submission()
            self.session.enter(batch, "submitting")
            return
        self.close_batch(batch, status, left)

    @staticmethod
    def _may_be_late(batch: Batch, status: BatchStatus, found: _Counts) -> bool:
        """True if the files have neither a line for each row nor as many answers as the provider counts."""
        if status.status is BatchState.FAILED or len(found.ours) >= batch.rows:
            return False
        if status.counts_rows:
            return found.answers < status.done
        return status.status is BatchState.COMPLETED and not status.outputs

    def unanswered(self, batch: Batch) -> dict[bytes, str]:
        """The keys and ids of a batch's rows that the ledger has no answer to.

        The ledger is read once. Since then only this object has recorded answers to rows of batches.
        """
        if self.known is None:
            self.known = read_index(self.session.fs, self.session.root).only(failed_count_as_answered=False)
        table = self.store.keys(batch)
        table = table.filter(pa.array(self.known.find(table["key"].cast(pa.binary(32))) < 0))
        answered = self.answered.get(batch.name, set())
        rows = zip(table["key"].to_pylist(), table["id"].to_pylist(), strict=True)
        return {key: id for key, id in rows if key not in answered}

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
            if key in keys:
                found.ours.add(key)
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
            request = Request([], generation, batch.model, task=self.session.config.task, inputs={"text": ""})
            completion = engine.read_batched(outcome, request)
            used, answered = completion.usage, completion.model
            null_for_absent = engine.null_for_absent(batch.model)
            if wrong := first_schema_error(completion, generation, batch.tries - 1, null_for_absent):
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
        if error.scope == "key" and not error.retryable:
            self.refusal = error
            return None
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
        last = self._reason_for_all(batch, status, whole=not reasons and len(left) == batch.rows)
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
        self.answered.pop(batch.name, None)

    def _line_errors(self, batch: Batch, status: BatchStatus) -> dict[bytes, EngineError]:
        """The rows that made the provider refuse the whole batch."""
        lines = {line: EngineError("bad_request", reason) for line, reason in status.lines.items()}
        if status.refusal and not self._live_follows and (line := self._own_line(batch, status)) is not None:
            lines = {line: status.refusal}
        keys = self.store.keys(batch)["key"].to_pylist() if lines else []
        return {keys[line - 1]: error for line, error in lines.items() if 0 < line <= len(keys)}

    def _refusal_of_all(self, batch: Batch, status: BatchStatus) -> EngineError | None:
        """Why the provider refused the whole batch, if the run must stop for it.

        A model or a parameter that rows name themselves is no such reason: these rows fail alone. With
        `run.batch_fallback=live` all rows go live, and the live requests show if they are refused too.
        """
        refusal = status.refusal
        if refusal is None or refusal.scope == "key":
            return refusal
        own = batch.model != self.session.model if refusal.scope == "model" else self._own_line(batch, status) is not None
        return None if own or self._live_follows else refusal

    def _own_line(self, batch: Batch, status: BatchStatus) -> int | None:
        """The input line that has the refused parameter itself; None if the parameter is the run's."""
        refusal, line = status.refusal, status.refused_line
        if refusal is None or refusal.scope != "run" or line is None:
            return None
        table = self.store.keys(batch)
        own = table["generation"].to_pylist() if "generation" in table.column_names else []
        return line if 0 < line <= len(own) and own[line - 1] else None

    def _reason_for_all(self, batch: Batch, status: BatchStatus, whole: bool) -> EngineError | None:
        """Why all rows without an answer fail; None if they are asked again. `whole`: no row is answered or blamed."""
        if batch.cancelled:
            return EngineError("cancelled", "its batch was cancelled", retryable=True)
        if self.refusal is not None:  # the rows stay open
            return None
        if status.status is BatchState.FAILED and whole and not self._live_follows:
            return status.refusal or EngineError("bad_request", status.error or "the batch failed")
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

    def commit(self, records: list[Record], batch: Batch | None = None) -> None:
        """Makes records durable and counts them. `batch`: the open batch that they belong to."""
        if not records:
            return
        write_segment(self.session.fs, self.session.root, BATCH_SEGMENT_PREFIX, records)
        if batch is not None:
            answered = (record.key for record in records if record.completion.error is None)
            self.answered.setdefault(batch.name, set()).update(answered)
        status = self.status
        failures: dict[bytes, str] = {}
        for record in records:
            completion = record.completion
            status.input_tokens += completion.usage.input
            status.output_tokens += completion.usage.output
            status.cost_usd += completion.cost_usd or 0.0
            status.cost_unknown += completion.cost_usd is None
            status.sent += completion.attempts
            if record.superseded:
                continue
            if completion.error is None:
                status.done += 1
            else:
                status.failed += 1
                failures[record.key] = completion.error.type
                status.first_errors.setdefault(completion.error.type, f"{record.id}: {completion.error.message}")
        final = [record for record in records if not record.superseded]
        cut = [record.key for record in final if record.completion.finish_reason == "length"]
        self.row_counter.finish([record.key for record in final], failures, cut)


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
