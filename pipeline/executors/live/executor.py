"""The live executor: replicas of the engine ask row by row, on all nodes of a Ray cluster."""

from __future__ import annotations

from engines.errors import ErrorCode
from engines.text import one_line
from pipeline.dataset.plan import SplitInput
from pipeline.errors import Stopped
from pipeline.executors.base import Execution, Executor
from pipeline.executors.live.live_run import LiveRun
from pipeline.monitor.console import warn
from pipeline.storage.ledger_snapshot import LedgerSnapshot

# Dispatchers that may die, each with its node, in one pass.
MAX_DISPATCHERS = 5


class LiveExecutor(Executor):
    """`run.mode=live`."""

    prepared = False

    def prepare(self) -> None:
        """Starts Ray, which takes seconds, and looks for room for the replicas."""
        if not self.prepared:
            self.context.cluster.check_room(self.context.placement, self.context.console)
            self.prepared = True

    def execute(self, inputs: SplitInput, known: LedgerSnapshot) -> Execution:
        from ray.exceptions import RayActorError

        self.prepare()
        self.warn_of_torn(known.index)
        for _ in range(MAX_DISPATCHERS):
            try:
                return LiveRun(self.context, inputs, known).run()
            except RayActorError as error:  # the dispatcher died, perhaps with its node; the ledger has all that matters
                warn(self.context.console, f"The dispatcher died; going on from the ledger. {one_line(error)}")
                known = self.context.snapshot(failed_count_as_answered=known.failed_count_as_answered)
        text = f"the dispatcher died {MAX_DISPATCHERS} times; the same command goes on from here"
        raise Stopped(text, code=ErrorCode.ROWS_MISSING)
