"""The live executor: replicas of the engine send one request per row, on all nodes of a Ray cluster."""

from __future__ import annotations

from engines.errors import ErrorCode
from engines.text import one_line
from pipeline.dataset.plan import SplitInput
from pipeline.errors import Stopped
from pipeline.executors.base import Execution, Executor
from pipeline.executors.live.live_run import LiveRun
from pipeline.monitor.console import warn
from pipeline.storage.filesystem import exists
from pipeline.storage.ledger_snapshot import LedgerSnapshot
from pipeline.storage.output_files import MANIFEST

# The maximum number of dispatchers in one pass. Each may die, for example with its node.
MAX_DISPATCHERS = 5


class LiveExecutor(Executor):
    """`run.mode=live`."""

    prepared = False

    def begin(self) -> None:
        """Begins to start Ray, which takes seconds. A run over a complete output may not need it."""
        if not exists(self.context.fs, f"{self.context.root}/{MANIFEST}"):
            self.context.cluster.begin()

    def prepare(self) -> None:
        """Waits until Ray runs, and looks for room for the replicas."""
        if not self.prepared:
            with self.context.phase("starting Ray"):
                self.context.cluster.check_room(self.context.groups, self.context.console)
            self.prepared = True

    def execute(self, inputs: SplitInput, known: LedgerSnapshot) -> Execution:
        from ray.exceptions import RayActorError

        self.prepare()
        self.warn_of_torn(known.index)
        for _ in range(MAX_DISPATCHERS):
            try:
                return LiveRun(self.context, inputs, known).run()
            except RayActorError as error:  # perhaps its node was lost; the ledger has all answers
                warn(self.context.console, f"The dispatcher died. The run continues from the ledger. {one_line(error)}")
                known = self.context.snapshot(failed_count_as_answered=known.failed_count_as_answered)
        text = f"the dispatcher died {MAX_DISPATCHERS} times; the same command continues"
        raise Stopped(text, code=ErrorCode.ROWS_MISSING)
