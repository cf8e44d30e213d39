"""Takes batches through their states, one durable step at a time.

    spooled -> uploaded -> submitting -> submitted -> fetched

Each state is written before the next step, so that a run may be killed anywhere. A crash between `submitting` and
`submitted` can leave a batch at the provider without a record here. So a batch in the state `submitting` is first searched
for at the provider. Where batches have no names, the search can find a batch of another program. Only its results show
that, and it is not cancelled before.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from engines.errors import EngineError, ErrorCode
from engines.remote.batch.client import BatchState, BatchStatus
from engines.text import one_line
from pipeline.errors import Stopped
from pipeline.executors.batch.collector import BatchCollector
from pipeline.executors.batch.session import BatchSession
from pipeline.executors.batch.store import NEXT_STEP, Batch
from pipeline.executors.stop_reasons import account_stop

CANCEL = "eagleray batch cancel ends it"
UNCLEAR = "it is not known yet if the provider has this batch: type the command again in {:.0f} s"
GUESSED = (
    "not cancelled, because it may be a batch of another program: the answer to our submission was lost, the provider "
    "keeps no names of batches, and this one only looks like ours. If it is yours, cancel it in the provider's console, or "
    "with engine.cancel_batch('{}') from Python. eagleray batch fetch sees by its results if it is ours"
)
# How long the provider's queue may be full with no batch of ours in it.
QUEUE_S = 24 * 3600.0


class BatchSteps:
    """Uploads, submits, polls and cancels. Raises `Stopped` for a refusal that waiting does not help against."""

    def __init__(
        self, session: BatchSession, collector: BatchCollector, check_interrupt: Callable[[], None] = lambda: None
    ) -> None:
        self.session, self.store, self.wire = session, session.store, session.wire
        self.collector, self.check_interrupt = collector, check_interrupt
        self.full_until = 0.0  # the provider's queue was full; no batch is submitted before
        self.full_with = 0  # our batches in the queue when it was full
        self.stalls: dict[str, tuple[str, float]] = {}  # batch -> why its step failed, and when the run stops for it

    def advance_all(self) -> bool:
        """Takes every open batch as far as it goes now. Returns true if one of them moved."""
        moved = False
        for batch in self.store.open:
            self.check_interrupt()
            moved |= self.advance(batch)
        return moved

    def advance(self, batch: Batch) -> bool:
        """Takes one batch as far as it goes now. Returns true if it moved."""
        before = batch.state
        try:
            self._step(batch)
        except EngineError as error:
            if not error.retryable:
                raise self._refusal(batch, error) from None
            self._stall(batch, str(error), self.session.config.run.max_outage_s)
            return False
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"the provider's answer is not as documented ({type(error).__name__}: {one_line(error)})"
            self._stall(batch, reason, self.session.config.run.max_outage_s)
            return False
        if batch.state != before:
            self.stalls.pop(batch.name, None)
        return batch.state != before

    def _step(self, batch: Batch) -> None:
        if batch.cancelled and batch.state in ("spooled", "uploaded"):
            self._close_unsubmitted(batch)
            return
        if batch.state == "spooled":
            batch.file = self.wire.upload(self.store.requests(batch))
            self.session.enter(batch, "uploaded")
        if batch.state == "uploaded" and self._has_room(batch):
            batch.submitting_at = batch.tried_at = time.time()
            self.session.enter(batch, "submitting")
            self._submit(batch)
        elif batch.state == "submitting":
            self._resubmit(batch)
        if batch.state == "submitted":
            self._poll(batch)

    def _refusal(self, batch: Batch, error: EngineError) -> Stopped:
        if error.type == "auth":
            return account_stop(error)
        reason = f"batch {batch.id or batch.name} cannot be {NEXT_STEP[batch.state]}: {error}"
        hint = f"if the provider has it no longer, delete {self.store.path(batch, 'json')}: its rows go again"
        text = f"{reason} ({hint if error.type == 'not_found' else CANCEL})"
        return Stopped(text, code=ErrorCode.BATCHES_UNDER_WAY)

    def _stall(self, batch: Batch, reason: str, patience_s: float) -> None:
        """The step failed and is tried again. The run stops if it still fails after `patience_s`."""
        _, until = self.stalls.get(batch.name, ("", time.monotonic() + patience_s))
        self.stalls[batch.name] = reason, until

    # -- submitting ----------------------------------------------------------------------------------------------------

    def _has_room(self, batch: Batch) -> bool:
        """True if the provider's queue may take another batch."""
        queued = [b for b in self.store.open if b.state in ("submitting", "submitted")]
        if time.monotonic() < self.full_until and len(queued) >= self.full_with:
            return False
        limit = self.session.queued_tokens
        return not limit or not queued or batch.tokens + sum(b.tokens for b in queued) <= limit

    def _submit(self, batch: Batch) -> None:
        try:
            batch.id = self.wire.submit(self.store.requests(batch), batch.file)
        except EngineError as error:
            if error.type != "rate_limit":
                raise
            self._queue_is_full(batch, str(error))  # a rate limit says for sure that no batch was made
            return
        self.session.enter(batch, "submitted")

    def _resubmit(self, batch: Batch) -> None:
        """A submission had no answer, or a run was killed in it: the provider may have the batch, and may list it late."""
        if self._find(batch):
            self.session.enter(batch, "submitted")
        elif self._wait_s(batch) <= 0:
            if batch.cancelled:
                self._close_unsubmitted(batch)
                return
            batch.tried_at = time.time()
            self.store.save(batch)
            self._submit(batch)

    def _find(self, batch: Batch) -> bool:
        """Looks for the batch at the provider. Returns true if there is one that is ours, or may be."""
        known = {*batch.foreign, *(other.id for other in self.store.batches if other.id)}
        batch.id = self.wire.find(self.store.requests(batch), batch.file, batch.submitting_at, known)
        batch.guessed = batch.id is not None and not self.wire.names_batches
        return batch.id is not None

    def _wait_s(self, batch: Batch) -> float:
        """Seconds until the provider lists a batch that the last submission made."""
        tried_at = max(batch.tried_at, batch.submitting_at)  # batches of earlier versions have no `tried_at`
        return tried_at + self.session.config.run.batch_poll_s - time.time()

    def _close_unsubmitted(self, batch: Batch) -> None:
        """Ends a cancelled batch that the provider does not have."""
        self.collector.close_batch(batch, BatchStatus("", BatchState.CANCELLED), self.collector.unanswered(batch))

    def _queue_is_full(self, batch: Batch, reason: str) -> None:
        batch.give_up_submission()
        self.session.enter(batch, "uploaded")
        self.full_until = time.monotonic() + self.session.config.run.batch_poll_s
        self.full_with = len([b for b in self.store.open if b.state == "submitted"])
        if not self.full_with:  # no end of a batch of ours will make room
            hint = "engine.provider.batch.queued_tokens or .rows makes batches smaller"
            self._stall(batch, f"the provider takes no batch: {reason} ({hint})", QUEUE_S)

    # -- polling and cancelling ----------------------------------------------------------------------------------------

    def _poll(self, batch: Batch) -> None:
        status = batch.status = self.wire.status(str(batch.id))
        if status.queue_full:
            self._queue_is_full(batch, status.error or "its queue is full")
        elif status.status is not BatchState.IN_PROGRESS:
            self.collector.fetch(batch, status)

    def cancel(self, batch: Batch) -> None:
        """Ends a batch because the user asks for it. Raises `EngineError`, also if the batch may be another program's."""
        batch.cancelled = True
        self.store.save(batch)
        if batch.state == "submitting" and not self._find(batch) and (wait_s := self._wait_s(batch)) > 0:
            raise EngineError("not_found", UNCLEAR.format(wait_s))
        if batch.id is None:  # the provider never got it
            self._close_unsubmitted(batch)
            return
        self.session.enter(batch, "submitted")
        if batch.guessed:
            batch.status = self.wire.status(batch.id)
            if batch.status.status is BatchState.IN_PROGRESS:
                raise EngineError("not_found", GUESSED.format(batch.id))
            return
        try:
            self.wire.cancel(batch.id)
        except EngineError:
            if self.wire.status(batch.id).status is BatchState.IN_PROGRESS:
                raise  # otherwise it ended in the meantime
