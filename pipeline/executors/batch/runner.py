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
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.fs as pafs
from rich.console import Console

from engines.errors import ConfigError, EngineError, ErrorCode, Failure
from engines.registry import load_engine
from engines.remote.batch.client import BatchState, BatchStatus
from engines.remote.batch.factory import encoded, no_batch_api, wire_of
from engines.structured import first_schema_error
from engines.text import one_line
from engines.types import Completion
from engines.usage import Usage
from pipeline.config import Config
from pipeline.dataset.reader import ReadSplit, RowReader, SplitSummary
from pipeline.errors import Interrupted, Stopped
from pipeline.executors.batch.store import BYTES_PER_TOKEN, NEXT_STEP, Batch, BatchFileWriter, BatchStore
from pipeline.executors.cost_budget import CostBudget, check_model, spent_so_far
from pipeline.executors.live.requests import read_split, request_of
from pipeline.monitor.progress import RunProgress
from pipeline.monitor.status import RunStatus
from pipeline.output.cost import WRITER, batch_share, old_costs
from pipeline.storage.exact_json import loads
from pipeline.storage.ledger import Record, write_segment
from pipeline.storage.ledger_index import DedupFilter, Index, read_index

GO_ON = "batches under way go on at the provider, the same command fetches them (eagleray batch cancel ends them)"

CANCEL = "eagleray batch cancel ends it"

# How long a queue may be full with nothing of ours in it.
QUEUE_S = 24 * 3600.0
# Answers on their way into one segment.
SEGMENT_ROWS, SEGMENT_BYTES = 5_000, 32 << 20
# A poll comes after at least so long, and later each time that nothing has changed.
POLL_FIRST_S, POLL_FACTOR = 1.0, 1.5


class BatchRunner:
    """The rows of one output directory on their way through batches. Raises `ConfigError` and `Stopped`."""

    def __init__(self, config: Config, fs: pafs.FileSystem, root: str, row_reader: RowReader) -> None:
        self.config, self.fs, self.root, self.row_reader = config, fs, root, row_reader
        if not config.engine.provider.get("batch"):
            raise no_batch_api(config.engine.kind)
        self.engine, self.wire = wire_of(load_engine(dataclasses.replace(config.engine, fallback=[])))
        self.generation = config.params()
        self.engine.check(self.generation)
        limits = self.engine.provider.batch
        self.max_rows = min(limits.get("rows") or self.wire.max_rows, self.wire.max_rows)
        self.max_bytes = min(limits.get("bytes") or self.wire.max_bytes, self.wire.max_bytes)
        self.queued_tokens: int | None = limits.get("queued_tokens")
        if self.queued_tokens:
            self.max_bytes = min(self.max_bytes, self.queued_tokens * BYTES_PER_TOKEN)
        self.store = BatchStore(fs, root)
        self.settings = _plain({**config.engine.identity(), "generation": config.params().given()})
        for batch in self.store.open:
            if names := [name for name in self.settings if batch.settings.get(name) != self.settings[name]]:
                there = ", ".join(f"{name}={batch.settings.get(name)}" for name in names)
                text = f"batches under way were made with {there}: go on with that, or choose another output.path"
                raise ConfigError(text, code=ErrorCode.BATCHES_UNDER_WAY)
        # A run that goes on counts its rounds on; a new one begins anew.
        rounds = [batch.round for batch in self.store.batches]
        self.first_round = min((b.first for b in self.store.open), default=max(rounds, default=0) + 1)
        self.resumed = bool(self.store.open)
        self.full_until = 0.0  # the provider's queue is full, at least until then
        self.full_with = 0  # batches in it when it was found full
        self.stalls: dict[str, tuple[str, float]] = {}  # by batch: what it waits for, and until when at most
        self.status = RunStatus()
        self.budget: CostBudget | None = None
        self.left = 0  # rows that it has no room for
        self.interrupts: list[int] = []

    def ask(
        self,
        splits: list[ReadSplit],
        console: Console,
        interrupts: list[int],
        why_stop: Callable[[RunStatus], Stopped | None],
        step: str,
    ) -> dict[int, SplitSummary] | None:
        """Takes all rows through batches; in a `step` of "submit" or "fetch" as far as it goes now, and None where that
        is not to the end.

        With `run.batch_fallback=live` the end is that of the first round. Also raises `Interrupted`.
        """
        failed_too = self.resumed or step == "fetch" or not self.config.run.retry_failed
        limits, self.interrupts = self.config.run, interrupts
        self.store.sweep()
        for batch in [batch for batch in self.store.open if batch.state in ("spooled", "uploaded")]:
            if batch.rows > self.max_rows or batch.size > self.max_bytes:  # the limits were lowered
                self.store.forget(batch)
        with RunProgress(console, limits.progress_s, self.config.engine) as progress:
            while True:
                index = read_index(self.fs, self.root, old_costs(self.config.engine))
                self.budget = self._budget(index)
                rows, summaries = self.write_batches(splits, index.only(failed_too=failed_too))
                if self.left:
                    held = f"run.budget_usd={limits.budget_usd:g} has no room for {self.left:,} rows yet"
                    console.print(f"{held}: they wait for what is under way.", highlight=False)
                if not rows and not self.store.open:
                    if self.left and self.budget and limits.batch_fallback != "live":
                        self.status.broke = True
                        text = self.budget.summary(f"{self.left:,} rows are left")
                        raise Stopped(text, self.budget.higher, code=ErrorCode.BUDGET_SPENT)
                    return summaries
                failed_too = True
                pause = POLL_FIRST_S
                while self.store.open:
                    moved = self.step()
                    progress.show(self.shown())
                    if reason := why_stop(self.status):
                        raise Stopped(f"{reason}; {GO_ON}", code=reason.code)
                    for stall_reason, until in self.stalls.values():
                        if time.monotonic() > until:
                            raise Stopped(f"{stall_reason}; {GO_ON}", code=ErrorCode.BATCHES_UNDER_WAY)
                    pause = POLL_FIRST_S if moved else min(pause * POLL_FACTOR, limits.batch_poll_s)
                    until = time.monotonic() + (pause if self.store.open else 0)
                    if not moved and step:
                        return None
                    while time.monotonic() < until:
                        self._raise_if_interrupted()
                        progress.show(self.shown())
                        time.sleep(min(0.2, max(0.0, until - time.monotonic())))
                if limits.batch_fallback == "live":
                    return summaries

    def _budget(self, index: Index) -> CostBudget | None:
        """With what batches under way may cost reserved."""
        limit, engine = self.config.run.budget_usd, self.config.engine
        if limit is None:
            return None
        spent = spent_so_far(engine, self.config.params(), index, self.fs, self.root)
        # No trickle at first: each round of batches may take a day.
        budget = CostBudget(limit, engine, self.config.params(), spent, batch_share(engine), first_share=1.0)
        budget.reserved = sum(batch.estimate for batch in self.store.open)
        return budget

    def _raise_if_interrupted(self) -> None:
        if self.interrupts:
            raise Interrupted(f"interrupted; {GO_ON}")

    def close(self) -> None:
        self.wire.client.close()
        self.engine.close()

    # -- rows to batches ----------------------------------------------------------------------------------------------

    def write_batches(self, splits: list[ReadSplit], known: Index) -> tuple[int, dict[int, SplitSummary]]:
        """Batches of all rows that are neither in `known` nor under way; how many, and what reading found."""
        seen = DedupFilter()
        for batch in self.store.open:
            seen.add(self.store.keys(batch)["key"].cast(pa.binary(32)))
        round = max((b.round for b in self.store.batches if b.round >= self.first_round), default=self.first_round - 1) + 1
        writers: dict[str, BatchFileWriter] = {}
        refused: list[Record] = []
        summaries: dict[int, SplitSummary] = {}
        rows = self.left = 0
        for split in splits:
            summary = summaries[split.number] = SplitSummary()
            fail = self.config.dataset.on_bad_input == "fail"
            for table in read_split(split, self.row_reader, known, fail, summary):
                self._raise_if_interrupted()
                fresh = table.filter(pa.array(seen.add(table["key"])))
                for key, id, request in zip(*(fresh[name].to_pylist() for name in ("key", "id", "request")), strict=True):
                    cost = self.budget.max_cost(request) if self.budget else 0.0
                    if self.budget and not self.budget.fits(cost):
                        self.left += 1
                        continue
                    rows += 1
                    try:
                        values = loads(request)
                        model, line = self._line(key, values)
                    except EngineError as error:
                        refused.append(self._failed(key, id, error))
                        continue
                    writer = writers.get(model)
                    if writer and (writer.batch.rows == self.max_rows or writer.batch.size + len(line) > self.max_bytes):
                        self._advance(writers.pop(model).close())
                        writer = None
                    if writer is None:
                        name = f"eagleray-{secrets.token_hex(4)}-{len(self.store.batches) + len(writers) + 1:05d}"
                        writer = writers[model] = BatchFileWriter(
                            self.store, Batch(name, model, round, self.first_round, self.settings)
                        )
                    writer.add(key, id, line, values.get("generation"))
                    writer.batch.estimate += cost
                    if self.budget:
                        self.budget.reserved += cost
        for writer in writers.values():
            self._advance(writer.close())
        self._commit(refused)
        self._account(summaries)
        return rows, summaries

    def _line(self, key: bytes, values: dict[str, Any]) -> tuple[str, bytes]:
        request = request_of(values, self.generation, key)
        if self.budget is not None:
            check_model(request, self.config.engine)
        body = self.engine.body(self.engine.prepared(request))
        line = encoded(self.wire, key.hex(), body, self.engine)
        if len(line) > self.max_bytes:
            raise EngineError("invalid_input", f"the request has {len(line):,} bytes, a batch holds {self.max_bytes:,}")
        return str(body.get("model")), line

    def _account(self, summaries: dict[int, SplitSummary]) -> None:
        status, all = self.status, summaries.values()
        status.read, status.invalid = sum(s.rows for s in all), sum(s.invalid for s in all)
        status.fed = True

    # -- one step at a time -------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Takes every open batch as far as it goes now; whether any of them moved."""
        moved = False
        for batch in self.store.open:
            self._raise_if_interrupted()
            moved |= self._advance(batch)
        return moved

    def _advance(self, batch: Batch) -> bool:
        before = batch.state
        try:
            if batch.state == "spooled":
                batch.file = self.wire.upload(self.store.requests(batch))
                self._now(batch, "uploaded")
            if batch.state == "uploaded" and self._room(batch):
                batch.submitting_at = time.time()
                self._now(batch, "submitting")
                self._submit(batch)
            elif batch.state == "submitting":
                self._resubmit(batch)
            if batch.state == "submitted":
                self._poll(batch)
        except EngineError as error:
            if error.type == "auth":
                text = f"the provider refuses the key ({error}); the same command goes on from here"
                raise Stopped(text, code=ErrorCode.KEY_REFUSED) from None
            if not error.retryable:
                file = self.store.path(batch, "json")
                reason = f"batch {batch.id or batch.name} cannot be {NEXT_STEP[batch.state]}: {error}"
                hint = f"if the provider has it no longer, delete {file}: its rows go again"
                text = f"{reason} ({hint if error.type == 'not_found' else CANCEL})"
                raise Stopped(text, code=ErrorCode.BATCHES_UNDER_WAY) from None
            self._wait_for(batch, str(error), self.config.run.max_outage_s)
            return False
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"the provider's answer is not as documented ({type(error).__name__}: {one_line(error)})"
            self._wait_for(batch, reason, self.config.run.max_outage_s)
            return False
        if batch.state != before:
            self.stalls.pop(batch.name, None)
        return batch.state != before

    def _wait_for(self, batch: Batch, stall_reason: str, patience_s: float) -> None:
        """Its step is tried again; the run stops where that does not help for so long."""
        _, until = self.stalls.get(batch.name, ("", time.monotonic() + patience_s))
        self.stalls[batch.name] = stall_reason, until

    def _resubmit(self, batch: Batch) -> None:
        """Whoever was here before may have come as far as the provider, whose list may be late."""
        known = {*batch.foreign, *(other.id for other in self.store.batches if other.id)}
        batch.id = self.wire.find(self.store.requests(batch), batch.file, batch.submitting_at, known)
        if batch.id is not None:
            self._now(batch, "submitted")
        elif time.time() > batch.submitting_at + self.config.run.batch_poll_s:
            self._submit(batch)

    def _now(self, batch: Batch, state: str) -> None:
        batch.state = state
        self.store.save(batch)

    def _room(self, batch: Batch) -> bool:
        """Whether the provider's queue may take another batch."""
        queued = [b for b in self.store.open if b.state in ("submitting", "submitted")]
        if time.monotonic() < self.full_until and len(queued) >= self.full_with:
            return False
        limit = self.queued_tokens
        return not limit or not queued or batch.tokens + sum(b.tokens for b in queued) <= limit

    def _submit(self, batch: Batch) -> None:
        try:
            batch.id = self.wire.submit(self.store.requests(batch), batch.file)
        except EngineError as error:
            if error.type != "rate_limit":
                raise
            self._full(batch, str(error))  # that much is sure: it made none
            return
        self._now(batch, "submitted")

    def _full(self, batch: Batch, reason: str) -> None:
        batch.id = None
        self._now(batch, "uploaded")
        self.full_until = time.monotonic() + self.config.run.batch_poll_s
        self.full_with = len([b for b in self.store.open if b.state == "submitted"])
        if not self.full_with:  # nothing of ours will make room
            hint = "engine.provider.batch.queued_tokens or .rows makes batches smaller"
            self._wait_for(batch, f"the provider takes no batch: {reason} ({hint})", QUEUE_S)

    def _poll(self, batch: Batch) -> None:
        status = batch.status = self.wire.status(str(batch.id))
        if status.queue_full:
            self._full(batch, status.error or "its queue is full")
        elif status.status is not BatchState.IN_PROGRESS:
            self._fetch(batch, status)

    def cancel(self, batch: Batch) -> None:
        """Ends a batch at the user's word. Raises `EngineError`."""
        batch.cancelled = True
        self.store.save(batch)
        if batch.state == "submitting":
            known = {*batch.foreign, *(other.id for other in self.store.batches if other.id)}
            batch.id = self.wire.find(self.store.requests(batch), batch.file, batch.submitting_at, known)
        if batch.id is None:  # it never came to the provider
            self._close(batch, BatchStatus("", BatchState.CANCELLED), self._left(batch))
            return
        self._now(batch, "submitted")
        try:
            self.wire.cancel(batch.id)
        except EngineError:
            if self.wire.status(batch.id).status is BatchState.IN_PROGRESS:
                raise  # or it has ended meanwhile

    # -- batches to rows ----------------------------------------------------------------------------------------------

    def _fetch(self, batch: Batch, status: BatchStatus) -> None:
        """Everything that an ended batch came to, into the ledger. Raises `EngineError`, with what came before kept."""
        left, found = self._left(batch), Counter[str]()
        if not batch.fetched_at:
            batch.fetched_at = time.time()
            self.store.save(batch)
        for records in _portions(self._records(batch, status, left, found)):
            self._commit(records)
        whole = status.status is BatchState.COMPLETED
        short = found["answers"] < status.done if status.counts_rows else whole and not status.outputs
        if short and status.status is not BatchState.FAILED:
            expected = f"of {status.done:,} answers" if status.counts_rows else "of the answers"
            raise EngineError("bad_response", f"{expected} {found['answers']:,} are there so far", retryable=True)
        if found["lines"] and not found["ours"]:  # another's, that looked like it
            batch.foreign.append(str(batch.id))
            batch.id = None
            self._now(batch, "submitting")
            return
        self._close(batch, status, left)

    def _left(self, batch: Batch) -> dict[bytes, str]:
        """The rows of a batch that have no answer yet, with their ids."""
        table = self.store.keys(batch)
        keys = table["key"].cast(pa.binary(32))
        known = read_index(self.fs, self.root).only(failed_too=False)
        table = table.filter(pa.array(known.find(keys) < 0))
        return dict(zip(table["key"].to_pylist(), table["id"].to_pylist(), strict=True))

    def _close(self, batch: Batch, status: BatchStatus, left: dict[bytes, str]) -> None:
        """Settles the rows for which there is nothing more to come, and the batch."""
        reasons: dict[bytes, EngineError] = {}
        if status.lines:  # the provider took none of them, because of these
            keys = self.store.keys(batch)["key"].to_pylist()
            for line, reason in status.lines.items():
                if 0 < line <= len(keys):
                    reasons[keys[line - 1]] = EngineError("bad_request", reason)
        live = self.config.run.batch_fallback == "live"
        failed = status.status is BatchState.FAILED and not status.lines and len(left) == batch.rows
        last: EngineError | None = None
        if batch.cancelled:
            last = EngineError("cancelled", "its batch was cancelled", retryable=True)
        elif failed and not live:
            last = EngineError("bad_request", status.error or "the batch failed")
        elif self._last(batch):
            last = EngineError("bad_response", f"no answer to it came back, {batch.tries} times", retryable=True)
        settled = [self._failed(key, id, error) for key, id in left.items() if (error := reasons.get(key) or last)]
        for record in settled:
            record.completion.attempts = batch.tries
        self._commit(settled)
        batch.again = len(left) - len(settled)
        batch.failed += len(settled)
        batch.answered = batch.rows - batch.failed - batch.again
        batch.ended = str(status.status)
        self._now(batch, "fetched")
        self.store.drop_files(batch)

    def _last(self, batch: Batch) -> bool:
        """Whether its rows do not go again: neither in another batch nor live."""
        live = self.config.run.batch_fallback == "live"
        return batch.cancelled or (not live and batch.tries > self.config.engine.max_retries)

    def _records(self, batch: Batch, status: BatchStatus, left: dict[bytes, str], found: Counter[str]) -> Iterator[Record]:
        """What came back for the rows of `left`, taken out of it; `found` counts lines, answers, and those of ours."""
        table = self.store.keys(batch)
        keys = table["key"].to_pylist()
        own = dict(zip(keys, table["generation"].to_pylist() if "generation" in table.column_names else [], strict=False))
        keys = set(keys)
        batch.failed = 0
        for custom_id, outcome in self.wire.results(status):
            found["lines"] += 1
            found["answers"] += not isinstance(outcome, EngineError)
            try:
                key = bytes.fromhex(custom_id)
            except ValueError:
                continue
            found["ours"] += key in keys
            id = left.get(key)
            if id is None:  # none of ours, or it came before
                continue
            # An answer that cannot be read is paid, and does not tell its usage.
            used, answered = Usage(known=isinstance(outcome, EngineError)), None
            try:
                generation = self.generation.override(loads((own.get(key) or "{}").encode()))
                completion = self.engine.read(outcome, generation.n)
                used, answered = completion.usage, completion.model
                if wrong := first_schema_error(completion, generation, batch.tries - 1):
                    raise wrong
            except (EngineError, KeyError, TypeError, ValueError, AttributeError) as raised:
                error = raised if isinstance(raised, EngineError) else _odd(raised)
                record = self._failed(key, id, error)
                record.done_at = batch.fetched_at
                record.completion.usage = used = error.usage or used
                record.completion.cost_usd = cost = self._cost(batch, used, answered)
                if error.retryable and not self._last(batch):
                    if cost != 0:  # it is asked again; this try is paid, and its attempt is counted then
                        record.completion.attempts, record.superseded = 0, True
                        yield record
                    continue
                batch.failed += 1
                del left[key]
                record.completion.attempts = batch.tries
                yield record
                continue
            completion.cost_usd = self._cost(batch, used, answered)
            completion.engine, completion.model = self.engine.kind, completion.model or batch.model
            completion.attempts = batch.tries
            del left[key]
            yield Record(key, id, completion, time.time())

    def _cost(self, batch: Batch, usage: Usage, answered: str | None) -> float | None:
        return self.engine.cost(usage, batch.model, answered, batch=True)

    def _failed(self, key: bytes, id: str, error: EngineError) -> Record:
        said = self.wire.client.clean(" ".join(str(error).split()))[:500]
        failure = dataclasses.replace(Failure.of(error), message=said)
        completion = Completion(error=failure, engine=self.engine.kind, model=self.config.engine.model, attempts=0)
        return Record(key, id, completion, time.time())

    def _commit(self, records: list[Record]) -> None:
        if not records:
            return
        write_segment(self.fs, self.root, WRITER, records)
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

    # -- what a person wants to know ----------------------------------------------------------------------------------

    def shown(self) -> RunStatus:
        """How the run stands, with what the provider tells of the batches under way."""
        under_way = [batch for batch in self.store.open if batch.status is not None]
        done = sum(done_of(b.rows, b.status) for b in under_way)
        waiting = sum(batch.rows for batch in self.store.open)
        answered = max(0, self.status.read - self.status.invalid - waiting - self.status.done - self.status.failed)
        return dataclasses.replace(
            self.status,
            done=self.status.done + done,
            answered=answered,
            in_flight=waiting - done,
            trouble=next((stall_reason for stall_reason, _ in self.stalls.values()), ""),
        )


def _odd(error: Exception) -> EngineError:
    reason = f"the answer is not as documented ({type(error).__name__}: {one_line(error)})"
    return EngineError("bad_response", reason, retryable=True)


def _plain(value: Any) -> Any:
    """As it comes back from a JSON file."""
    return orjson.loads(orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS))


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
