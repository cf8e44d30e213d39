"""One pass of the live executor, in the driver: starts the dispatcher and the replicas, watches them, and ends them."""

from __future__ import annotations

import math
import time
from typing import Any

from engines.errors import EaglerayError, ErrorCode
from engines.text import counted
from pipeline.context import RunContext
from pipeline.dataset.plan import SplitInput
from pipeline.errors import Interrupted, Stopped
from pipeline.executors.base import Execution
from pipeline.executors.cost_budget import CostBudget, spent_so_far
from pipeline.executors.live.dispatcher import Dispatcher
from pipeline.executors.live.placement import not_ready
from pipeline.executors.live.rate_limiter import rate_limit_actor
from pipeline.executors.live.ray_session import PATIENCE_S, here, own_ray_ended
from pipeline.executors.live.replicas import ReplicaPool
from pipeline.executors.live.worker import Worker, WorkerConfig
from pipeline.executors.stop_reasons import stop_reason
from pipeline.monitor.console import warn
from pipeline.monitor.progress import RunProgress
from pipeline.monitor.status import RunStatus
from pipeline.storage.claim import claim_of
from pipeline.storage.filesystem import absolute
from pipeline.storage.ledger_snapshot import LedgerSnapshot

# After `run.drain_s`, the workers have this time to write their results and leave.
GRACE_S = 20.0
# The time in which Ray's server ends after its actors, if all got a signal; and if this process got one, too.
RAY_ENDS_S, RAY_ENDS_SIGNALLED_S = 3.0, 30.0


class LiveRun:
    """Feeds all rows that `known` does not have to the replicas, until every one of them is durable."""

    def __init__(self, context: RunContext, inputs: SplitInput, known: LedgerSnapshot) -> None:
        self.context, self.inputs, self.known = context, inputs, known
        self.claim = claim_of(context.root)
        self.budget: CostBudget | None = None
        self.status = RunStatus()
        self.failure: EaglerayError | None = None  # of one replica; the others still commit their results
        self.stop: EaglerayError | None = None  # why the run stops early
        self.ends_by = math.inf  # a drain ends then, even if requests are still in flight
        self.began = time.monotonic()
        self.told: set[tuple[str, str, str, int | None]] = set()  # problems that the user knows
        self.seen_worker = False  # a replica works, or the user was told that none does

    def run(self) -> Execution:
        """Raises `RayActorError` if the dispatcher dies."""
        import ray
        from ray.exceptions import RayActorError

        context = self.context
        self.budget = self._open_budget()
        since = time.time()  # the first replica may answer before the last one has started
        dispatcher = self.dispatcher = self._start_dispatcher()
        # A local variable, because Ray ends an actor when its last handle is gone.
        limits = rate_limit_actor(context.config.engine) if context.config.engine.provider else None
        worker = self._worker_config()
        deaths = context.config.run.max_engine_deaths
        own = context.cluster.own
        self.replicas = ReplicaPool(ray.remote(Worker), worker, context.groups, dispatcher, deaths, own)
        reads = dispatcher.start.remote(dispatcher.report)
        try:
            with context.phase("starting the replicas"):
                self.replicas.start()
                ray.get(reads)
            context.state.begin_pass(since)
            self._watch()
            context.state.status = self.status = ray.get(dispatcher.status.remote())
            self._warn_of_problems()
            ray.get(dispatcher.settle.remote())
            summaries = ray.get(dispatcher.take_summaries.remote())
        except RayActorError:
            if own_ray_ended(RAY_ENDS_SIGNALLED_S if context.interrupts else RAY_ENDS_S):
                raise self._ray_ended() from None
            raise
        finally:
            if not own_ray_ended():
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
            [context.cluster.share(self.known)],  # in a list, so that the reference arrives: only readers need the index
            context.config.dataset.on_bad_input == "fail",
            self.inputs.small,
            self.budget,
            absolute(context.output_path),
            self.claim.path if self.claim else None,
        )

    def _worker_config(self) -> WorkerConfig:
        context, run = self.context, self.context.config.run
        return WorkerConfig(
            engine=context.config.engine,
            generation=context.params,
            output_path=absolute(context.output_path),
            flush_s=run.flush_s,
            drain_s=run.drain_s,
            max_outage_s=run.max_outage_s,
            cpus=0,  # each group of replicas has its own
            trace=context.trace,
            budget=self.budget is not None,
            claim=self.claim.path if self.claim else None,
            same_refusals_stop=run.max_error_rate != 1,
            task=context.config.task,
        )

    # -- while it works ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Looks at the dispatcher and the replicas a few times a second, until no replica has anything left to do."""
        import ray

        context, run = self.context, self.context.config.run
        with RunProgress(
            context.console, run.progress_s, context.config.engine, run.budget_usd, context.started
        ) as progress:
            while True:
                if self.claim is not None:
                    self.claim.raise_if_lost()
                status: RunStatus = ray.get(self.dispatcher.status.remote())
                context.state.status = self.status = status
                self._warn_of_problems()
                progress.show(context.state.now, len(self.replicas.replicas))
                try:
                    self.replicas.maintain(status)
                except EaglerayError as error:
                    self.failure = self.failure or error
                self._warn_if_not_ready()
                if self.stop is None and (reason := self._reason_to_stop()) is not None:
                    self._drain(reason)
                if (status.finished and not status.workers) or time.monotonic() > self.ends_by:
                    return
                self.replicas.wait(0.05 if status.finished else 0.2)

    def _warn_of_problems(self) -> None:
        for problem in self.status.problems:
            if (told := (problem.entry, problem.kind, problem.reason, problem.at_once)) not in self.told:
                self.told.add(told)
                warn(self.context.console, f"{problem.sentence()}.")

    def _warn_if_not_ready(self) -> None:
        self.seen_worker = self.seen_worker or self.status.workers > 0
        if not self.seen_worker and time.monotonic() - self.began > PATIENCE_S:
            self.seen_worker = True
            warn(self.context.console, not_ready(self.context.groups))

    def _reason_to_stop(self) -> EaglerayError | None:
        status, interrupts = self.status, self.context.interrupts
        if status.refusal is not None:
            message, code = status.refusal
            return Stopped(message, code=code)
        if reason := stop_reason(self.context.config.run, status):
            return reason
        if interrupts:
            return Interrupted("Interrupted")
        if self.failure is None and status.broke and self.budget is not None:
            self.budget.spent = status.spent
            text = self.budget.summary()
            return Stopped(text, self.budget.higher, code=ErrorCode.BUDGET_SPENT)
        return self.failure

    def _drain(self, reason: EaglerayError) -> None:
        """Lets the replicas finish the requests in flight, and starts no more."""
        import ray

        self.stop, self.ends_by = reason, time.monotonic() + self.context.config.run.drain_s + GRACE_S
        if self.status.leased:
            again = " (a second signal ends the run at once)" if self.context.interrupts else ""
            count = counted(self.status.in_flight, "request") if self.status.in_flight else "the requests"
            warn(self.context.console, f"{reason}: waiting for {count} in flight{again}.")
        ray.get(self.dispatcher.stop.remote())
        self.replicas.drain()

    def _ray_ended(self) -> EaglerayError:
        """The error of a run whose Ray was ended from outside, for example by a signal to all processes of a service."""
        kept = "all durable results are kept; the same command continues"
        if self.context.interrupts:
            return Interrupted(f"interrupted, and Ray's processes were ended too; {kept}")
        return Stopped(f"Ray's processes on this machine ended; {kept}", code=ErrorCode.RAY_ENDED)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _raise_reason(self) -> None:
        """Raises the reason for an early end, if there is one."""
        if self.status.broken is not None:
            raise Stopped(f"reading the input failed: {self.status.broken}", code=ErrorCode.INPUT_UNREADABLE)
        if self.failure is not None:
            raise self.failure
        if self.stop is None:
            return
        kept = "all durable results are kept; the same command continues"
        if self.context.interrupts:
            raise Interrupted(f"interrupted; {kept}")
        if self.stop.code == ErrorCode.BUDGET_SPENT:  # its message says how to go on
            raise self.stop
        raise Stopped(f"{self.stop}; {kept}", code=self.stop.code)
