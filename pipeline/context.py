"""What a run resolves once from its configuration: filesystem, row reader, placement, ownership, Ray cluster and more."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field

import pyarrow.fs as pafs
from rich.console import Console

from engines.params import GenerationParams
from pipeline.config import Config
from pipeline.dataset.formats import RowParser
from pipeline.dataset.keys import RequestHasher
from pipeline.dataset.reader import RowReader
from pipeline.executors.live.cluster import RayCluster
from pipeline.executors.live.placement import Placement, placement
from pipeline.monitor.run_state import RunState
from pipeline.monitor.traces import RunSpan, Trace
from pipeline.output.answer_columns import plan_answer_columns
from pipeline.output.cost import old_costs
from pipeline.output.ownership import Ownership
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger_snapshot import LedgerSnapshot


@dataclass(slots=True)
class RunContext:
    """Travels through a run in place of its configuration. Make it with `resolve_context`."""

    config: Config
    console: Console
    params: GenerationParams
    fs: pafs.FileSystem
    root: str  # of the output, on `fs`
    row_reader: RowReader
    placement: Placement
    ownership: Ownership
    step: str  # of `eagleray batch`: submit or fetch; empty for a whole run
    stack: contextlib.ExitStack  # closes, at the end of the run, what was opened during it
    interrupts: list[int]  # signals so far
    cluster: RayCluster
    started: float = field(default_factory=time.time)
    span: RunSpan | None = None
    state: RunState = field(init=False)  # set when the output is locked

    @property
    def output_path(self) -> str:
        return str(self.config.output.path)

    @property
    def trace(self) -> Trace | None:
        return self.span.trace if self.span else None

    def snapshot(self, *, failed_count_as_answered: bool) -> LedgerSnapshot:
        """The ledger as it is now. If failed requests do not count as answered, they are sent again."""
        costs = old_costs(self.config.engine)
        return LedgerSnapshot(
            self.fs, self.root, costs, self.cluster.read_ledger, failed_count_as_answered=failed_count_as_answered
        )


def resolve_context(config: Config, console: Console, step: str = "") -> RunContext:
    """Checks the configuration and resolves it. Writes nothing. Raises `ConfigError`."""
    config.check()
    placed = placement(config.hardware, config.engine)
    fs, root = resolve(str(config.output.path))
    params, dataset = config.params(), config.dataset
    plan_answer_columns(config.output.columns, params.response_format)  # raises before anything starts
    parser = RowParser(dataset.format, dataset.columns, dataset.template)
    row_reader = RowReader(parser, RequestHasher(config.engine, params), dataset.max_row_bytes)
    ownership = Ownership.look(config, fs, root)
    stack, interrupts = contextlib.ExitStack(), list[int]()
    cluster = RayCluster(str(config.output.path), config.engine, stack, interrupts)
    return RunContext(config, console, params, fs, root, row_reader, placed, ownership, step, stack, interrupts, cluster)
