"""The batch executor: rows go to the provider's batch API, and their answers come back into the ledger.

Each batch has files under `_batches/`: its requests, their keys, and its state. So a run may be killed anywhere, or end
while the provider works for a day. Ray is not needed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from engines.config import EngineConfig, Price
from engines.errors import ConfigError, EngineError, ErrorCode, Finding
from engines.remote.batch.factory import check_batch_task, no_batch_api
from engines.remote.provider import Provider
from engines.text import counted
from pipeline.config import Config
from pipeline.context import RunContext
from pipeline.dataset.plan import SplitInput
from pipeline.dataset.reader import SplitSummary
from pipeline.errors import Interrupted, Stopped
from pipeline.executors.base import Execution, Executor, Preview
from pipeline.executors.batch.collector import BatchCollector
from pipeline.executors.batch.planner import BatchPlanner
from pipeline.executors.batch.preview import BatchPreview
from pipeline.executors.batch.session import BatchSession, done_of
from pipeline.executors.batch.steps import BatchSteps
from pipeline.executors.batch.store import BatchStore
from pipeline.executors.cost_budget import CostBudget, spent_so_far
from pipeline.executors.stop_reasons import account_stop, stop_reason
from pipeline.monitor.progress import RunProgress
from pipeline.monitor.status import RunStatus
from pipeline.output.cost import old_costs
from pipeline.signals import note_signals
from pipeline.storage.ledger import Record
from pipeline.storage.ledger_index import Index, read_index
from pipeline.storage.ledger_snapshot import LedgerSnapshot

GO_ON = "batches under way go on at the provider, the same command fetches them (eagleray batch cancel ends them)"
# What the provider refuses for all rows, by the scope of its error.
REFUSED = {
    "model": "the provider takes no batch for this model; run.mode=live sends requests instead",
    "run": "the provider refuses a parameter",
}
# The first wait between two polls, in seconds. Each poll without news makes the wait longer, up to `run.batch_poll_s`.
POLL_FIRST_S, POLL_FACTOR = 1.0, 1.5


class BatchExecutor(Executor):
    """`run.mode=batch`. In a step of `eagleray batch` (`context.step`) it goes as far as it can without waiting."""

    price_name = " for batches"

    def __init__(self, context: RunContext) -> None:
        super().__init__(context)
        self.step = context.step
        self.session = BatchSession(context.config, context.fs, context.root)
        self.store = self.session.store
        self._reset()

    def _reset(self) -> None:
        self.collector = BatchCollector(self.session)
        self.steps = BatchSteps(self.session, self.collector, self._check_interrupt)
        self.status = self.collector.status

    @classmethod
    def followed_by(cls, config: Config) -> Sequence[str]:
        return ("live",) if config.run.batch_fallback == "live" else ()

    @classmethod
    def findings(cls, config: Config) -> list[Finding]:
        if not config.engine.provider.get("batch"):
            return [Finding.of(no_batch_api(config.engine.kind))]
        try:
            check_batch_task(config.engine, config.task)
        except EngineError as error:
            return [Finding.of(error)]
        return []

    @classmethod
    def preview(cls, config: Config) -> Preview:
        return BatchPreview(config)

    @classmethod
    def price(cls, engine: EngineConfig) -> Price:
        return engine.price.in_batch(Provider.of(engine).batch_share(engine.model))

    @classmethod
    def clear(cls, context: RunContext) -> None:
        store = BatchStore(context.fs, context.root)
        if under_way := [batch.id or batch.name for batch in store.open]:
            batches = counted(len(under_way), "batch", "batches")
            raise ConfigError(
                f"run.resume=false would forget {batches} under way ({under_way[0]}, …): "
                "wait for them, or end them with eagleray batch cancel",
                code=ErrorCode.BATCHES_UNDER_WAY,
            )
        for batch in list(store.batches):
            store.forget(batch)
        store.sweep()

    @classmethod
    def manifest_entries(cls, context: RunContext) -> dict[str, Any]:
        return {"batches": BatchStore(context.fs, context.root).summary()}

    @property
    def under_way(self) -> bool:
        return bool(self.store.open)

    def close(self) -> None:
        self.session.close()

    def execute(self, inputs: SplitInput, known: LedgerSnapshot) -> Execution:
        """Takes all rows through batches, round after round. With `run.batch_fallback=live` there is one round."""
        context, step = self.context, self.step
        context.state.begin_pass()
        self._reset()
        self.step = ""  # a later pass waits
        context.stack.enter_context(note_signals(context.interrupts))
        context.state.source = self.shown
        failed_count_as_answered = known.failed_count_as_answered or self.session.resumed or step == "fetch"
        self._drop_oversized()
        run = context.config.run
        with RunProgress(context.console, run.progress_s, context.config.engine, began=context.started) as progress:
            while True:
                planner = self._plan(inputs, failed_count_as_answered)
                self._check_stop()  # a batch may have failed at once
                failed_count_as_answered = True
                if not planner.rows and not self.store.open:
                    self._check_left(planner)
                    return Execution(self.status, planner.summaries)
                if not self._wait_for_all(progress, waits=not step):
                    unfinished = "batches are under way at the provider"
                    return Execution(self.status, planner.summaries, unfinished)
                if run.batch_fallback == "live":
                    return Execution(self.status, planner.summaries)

    # -- a round -------------------------------------------------------------------------------------------------------

    def _drop_oversized(self) -> None:
        """Removes files that nobody needs, and batches not yet submitted that are over the limits, which were lowered."""
        self.store.sweep()
        for batch in [batch for batch in self.store.open if batch.state in ("spooled", "uploaded")]:
            if batch.rows > self.session.max_rows or batch.size > self.session.max_bytes:
                self.store.forget(batch)

    def _plan(self, inputs: SplitInput, failed_count_as_answered: bool) -> BatchPlanner:
        """Writes the batches of the next round, and says how many rows the budget keeps back."""
        context, session = self.context, self.session
        index = read_index(context.fs, context.root, old_costs(context.config.engine))
        if not self.status.fed:  # in the first round
            self.warn_of_torn(index)
        refused: list[Record] = []

        def refuse(key: bytes, id: str, error: EngineError) -> None:
            refused.append(self.collector.failure(key, id, error))

        budget = self._open_budget(index)
        self.collector.known = index.only(failed_count_as_answered=False)
        counter = self.collector.row_counter
        counter.read_again()
        planner = BatchPlanner(
            session, context.row_reader, budget, self.steps.advance, refuse, self._check_interrupt, counter
        )
        planner.write(inputs.splits, index.only(failed_count_as_answered=failed_count_as_answered))
        self._count(planner.summaries)
        self.collector.commit(refused)
        if planner.left:
            held = (
                f"run.budget_usd={context.config.run.budget_usd:g} has no room for {counted(planner.left, 'request')} yet"
            )
            context.console.print(f"{held}: they wait until the batches under way are finished.", highlight=False)
        return planner

    def _open_budget(self, index: Index) -> CostBudget | None:
        """The budget, less the most that batches under way may cost."""
        limit, engine, params = self.context.config.run.budget_usd, self.context.config.engine, self.context.params
        if limit is None:
            return None
        spent = spent_so_far(engine, params, index, self.context.fs, self.context.root)
        # All of it may be in flight at first: each round of batches can take a day.
        budget = CostBudget(limit, engine, params, spent, batch=True, first_share=1.0)
        budget.reserved = sum(batch.estimate for batch in self.store.open)
        return budget

    def _check_left(self, planner: BatchPlanner) -> None:
        """Raises `Stopped` if the budget kept rows back and no other executor takes them."""
        if planner.left and planner.budget and self.context.config.run.batch_fallback != "live":
            self.status.broke = True
            text = planner.budget.summary()
            raise Stopped(text, planner.budget.higher, code=ErrorCode.BUDGET_SPENT)

    def _count(self, summaries: dict[int, SplitSummary]) -> None:
        """Counts the rows. What the ledger has by now includes the results of this pass, which the status counts too."""
        found, status = summaries.values(), self.status
        status.read, status.invalid = sum(s.rows for s in found), sum(s.invalid for s in found)
        status.answered = sum(s.answered for s in found) - status.rows_done
        status.failed_before = sum(s.failed for s in found) - status.rows_failed
        status.truncated_before = sum(s.truncated for s in found) - status.rows_truncated
        status.fed = True

    # -- waiting -------------------------------------------------------------------------------------------------------

    def _wait_for_all(self, progress: RunProgress, waits: bool) -> bool:
        """Takes all batches to their end. If it `waits` not, it returns false as soon as no batch moves."""
        pause = POLL_FIRST_S
        while self.store.open:
            moved = self.steps.advance_all()
            progress.show(self.context.state.now)
            self._check_stop()
            if not moved and not waits:
                return False
            pause = POLL_FIRST_S if moved else min(pause * POLL_FACTOR, self.context.config.run.batch_poll_s)
            until = time.monotonic() + (pause if self.store.open else 0)
            while time.monotonic() < until:
                self._check_interrupt()
                progress.show(self.context.state.now)
                time.sleep(min(0.2, max(0.0, until - time.monotonic())))
        return True

    def _check_stop(self) -> None:
        if self.collector.refusal is not None:
            raise self._refused(self.collector.refusal)
        if reason := stop_reason(self.context.config.run, self.status):
            raise Stopped(f"{reason}; {GO_ON}", code=reason.code)
        for stall_reason, until in self.steps.stalls.values():
            if time.monotonic() > until:
                raise Stopped(f"{stall_reason}; {GO_ON}", code=ErrorCode.BATCHES_UNDER_WAY)

    def _refused(self, error: EngineError) -> Stopped:
        """The reason to stop for an error that would hit all rows."""
        if error.scope == "key":
            return account_stop(error)
        engine = self.context.config.engine
        where = f"engine={engine.kind} at {self.session.wire.client.base} with engine.model={engine.model}"
        text = f"{REFUSED[error.scope]} ({where}: {error}); no row is recorded as failed"
        return Stopped(text, code=ErrorCode.REQUESTS_REFUSED)

    def _check_interrupt(self) -> None:
        if self.context.interrupts:
            raise Interrupted(f"interrupted; {GO_ON}")

    def shown(self) -> RunStatus:
        """The status for people, with what the provider says about batches under way."""
        open = self.store.open
        return dataclasses.replace(
            self.status,
            submitted=sum(batch.rows for batch in open),
            finished_there=sum(done_of(batch.rows, batch.status) for batch in open),
            trouble=next((stall_reason for stall_reason, _ in self.steps.stalls.values()), ""),
        )
