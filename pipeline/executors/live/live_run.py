"""One pass of the live executor, in the driver: starts the dispatcher and the replicas, watches them, and ends them."""

from __future__ import annotations

import math
import time
from typing import Any

from engines.errors import EaglerayError, ErrorCode
from pipeline.context import RunContext
from pipeline.dataset.plan import SplitInput
from pipeline.errors import Interrupted, Stopped
from pipeline.executors.base import Execution
from pipeline.executors.cost_budget import CostBudget, spent_so_far
from pipeline.executors.live.dispatcher import Dispatcher
from pipeline.executors.live.placement import spread
from pipeline.executors.live.rate_limiter import rate_limit_actor
from pipeline.executors.live.ray_session import PATIENCE_S, here
from pipeline.executors.live.replicas import ReplicaPool
from pipeline.executors.live.worker import Worker, WorkerConfig
from pipeline.executors.stop_reasons import stop_reason
from pipeline.monitor.console import warn
from pipeline.monitor.progress import RunProgress
from pipeline.monitor.status import RunStatus
from pipeline.storage.ledger_snapshot import LedgerSnapshot

# A drain has `run.drain_s`, and this long to write and leave.
GRACE_S = 20.0
# Rows that the dispatcher holds ready.
BUFFER_ROWS = 8 * 1024


class LiveRun:
    """Feeds all rows that `known` does not have to the replicas, until every one of them is durable."""

    def __init__(self, context: RunContext, inputs: SplitInput, known: LedgerSnapshot) -> None:
        self.context, self.inputs, self.known = context, inputs, known
        self.budget: CostBudget | None = None
        self.status = RunStatus()
        self.failure: EaglerayError | None = None  # of a replica; the others still commit what they have
        self.stop: EaglerayError | None = None  # why the run stops early
        self.ends_by = math.inf  # a drain ends then, whatever is still in flight
        self.began = time.monotonic()
        self.seen_worker = False  # a replica works, or the user was told that none does
        self.done_before, self.auth_before = 0, 0  # rows done, and refused for the key, when a row was last done

    def run(self) -> Execution:
        """Raises `RayActorError` if the dispatcher dies."""
        import ray

        context = self.context
        self.budget = self._open_budget()
        dispatcher = self.dispatcher = self._start_dispatcher()
        # A local variable, because Ray ends an actor when its last handle is gone.
        limits = rate_limit_actor(context.config.engine) if context.config.engine.provider else None
        worker = self._worker_config()
        deaths = context.config.run.max_engine_deaths
        self.replicas = ReplicaPool(ray.remote(Worker), worker, context.placement, dispatcher, deaths)
        reads = dispatcher.start.remote(dispatcher.report, BUFFER_ROWS)
        context.state.enter("asking")
        context.state.source = None
        try:
            self.replicas.start()
            ray.get(reads)
            self._watch()
            context.state.status = self.status = ray.get(dispatcher.status.remote())
            ray.get(dispatcher.settle.remote())
            summaries = ray.get(dispatcher.take_summaries.remote())
        finally:
            self.replicas.stop_all()
            ray.kill(dispatcher)
            del limits
        self._raise_reason()
        return Execution(self.status, summaries)

    # -- the start -----------------------------------------------------------------------------------------------------

    def _open_budget(self) -> CostBudget | None:
        context, engine = self.context, self.context.config.engine
        if (limit := context.config.run.budget_usd) is None:
            return None
        spent = spent_so_far(engine, context.params, self.known.index, context.fs, context.root)
        return CostBudget(limit, engine, context.params, spent)

    def _start_dispatcher(self) -> Any:
        import ray

        context = self.context
        actor = ray.remote(Dispatcher).options(num_cpus=0, scheduling_strategy=here())
        return actor.remote(
            self.inputs.splits,
            context.row_reader,
            [context.cluster.share(self.known)],  # in a list, so that the reference itself arrives: only readers need it
            context.config.dataset.on_bad_input == "fail",
            self.inputs.small,
            self.budget,
            context.output_path,
        )

    def _worker_config(self) -> WorkerConfig:
        context, run = self.context, self.context.config.run
        return WorkerConfig(
            engine=spread(context.config.engine, context.placement),
            generation=context.params,
            output_path=context.output_path,
            flush_s=run.flush_s,
            drain_s=run.drain_s,
            max_outage_s=run.max_outage_s,
            cpus=context.config.hardware.cpus,
            trace=context.trace,
            budget=self.budget is not None,
        )

    # -- while it works ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Looks at the dispatcher and the replicas a few times a second, until no replica has anything left to do."""
        import ray

        context, run = self.context, self.context.config.run
        with RunProgress(context.console, run.progress_s, context.config.engine, run.budget_usd) as progress:
            while True:
                status: RunStatus = ray.get(self.dispatcher.status.remote())
                context.state.status = self.status = status
                progress.show(status, len(self.replicas.replicas))
                try:
                    self.replicas.maintain(status)
                except EaglerayError as error:
                    self.failure = self.failure or error
                self._warn_of_idleness()
                if self.stop is None and (reason := self._reason_to_stop()) is not None:
                    self._drain(reason)
                if (status.finished and not status.workers) or time.monotonic() > self.ends_by:
                    return
                time.sleep(0.05 if status.finished else 0.2)

    def _warn_of_idleness(self) -> None:
        self.seen_worker = self.seen_worker or self.status.workers > 0
        if not self.seen_worker and time.monotonic() - self.began > PATIENCE_S:
            self.seen_worker = True
            wish = self.context.placement.wish()
            warn(self.context.console, f"No replica works yet: each asks for {wish}, and may be loading its model.")

    def _reason_to_stop(self) -> EaglerayError | None:
        status, interrupts = self.status, self.context.interrupts
        if status.done > self.done_before:
            self.done_before, self.auth_before = status.done, status.errors["auth"]
        if reason := stop_reason(self.context.config.run, status, status.errors["auth"] - self.auth_before):
            return reason
        if interrupts:
            return Interrupted("Interrupted")
        if self.failure is None and status.broke and self.budget is not None:
            self.budget.spent = status.spent
            more = "" if status.fed else " and those that are not read yet"
            text = self.budget.summary(f"{status.left:,} rows{more} are left")
            return Stopped(text, self.budget.higher, code=ErrorCode.BUDGET_SPENT)
        return self.failure

    def _drain(self, reason: EaglerayError) -> None:
        """Lets the replicas finish what is in flight, and no more."""
        import ray

        self.stop, self.ends_by = reason, time.monotonic() + self.context.config.run.drain_s + GRACE_S
        if self.status.in_flight:
            again = " (a second time ends at once)" if self.context.interrupts else ""
            warn(self.context.console, f"{reason}: finishing {self.status.in_flight} rows in flight{again}.")
        ray.get(self.dispatcher.stop.remote())
        self.replicas.drain()

    # -- the end -------------------------------------------------------------------------------------------------------

    def _raise_reason(self) -> None:
        """Raises the reason for an early end, if there is one."""
        if self.status.broken is not None:
            raise Stopped(f"reading the input failed: {self.status.broken}", code=ErrorCode.INPUT_UNREADABLE)
        if self.failure is not None:
            raise self.failure
        if self.stop is None:
            return
        kept = "everything finished is kept, the same command goes on from here"
        if self.context.interrupts:
            raise Interrupted(f"interrupted; {kept}")
        if self.stop.code == ErrorCode.BUDGET_SPENT:  # its message says how to go on
            raise self.stop
        raise Stopped(f"{self.stop}; {kept}", code=self.stop.code)
