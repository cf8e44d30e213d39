"""The context of a run: its configuration, and the objects made from it once, such as the filesystem and the row reader."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow.fs as pafs
from rich.console import Console

from engines.errors import ConfigError
from engines.params import GenerationParams
from pipeline.config import STDOUT, Config
from pipeline.dataset.formats import RowParser
from pipeline.dataset.keys import RequestHasher
from pipeline.dataset.reader import RowReader
from pipeline.dataset.stdin import STDIN, PipedInput, receive
from pipeline.executors.live.cluster import RayCluster
from pipeline.executors.live.placement import ReplicaGroup, replica_groups
from pipeline.monitor.progress import phase_line
from pipeline.monitor.run_state import RunState
from pipeline.monitor.traces import RunSpan, Trace
from pipeline.origin import Origin
from pipeline.output.answer_columns import plan_answer_columns
from pipeline.output.cost import old_costs
from pipeline.output.ownership import Ownership
from pipeline.output.table_append import check_table
from pipeline.signals import Interrupts
from pipeline.storage.filesystem import absolute, resolve
from pipeline.storage.ledger_snapshot import LedgerSnapshot


@dataclass(slots=True)
class RunContext:
    """The parts of a run receive it in place of the configuration. `resolve_context` makes it."""

    config: Config
    console: Console
    params: GenerationParams
    fs: pafs.FileSystem
    root: str  # of the output, on `fs`
    row_reader: RowReader
    groups: tuple[ReplicaGroup, ...]  # of replicas
    ownership: Ownership
    piped: PipedInput | None  # standard input, if it is the dataset
    step: str  # of `eagleray batch`: submit or fetch; empty for a whole run
    stack: contextlib.ExitStack  # everything to close at the end of the run
    interrupts: Interrupts
    cluster: RayCluster
    started: float = field(default_factory=time.time)
    origin: Origin = field(default_factory=Origin)
    span: RunSpan | None = None
    state: RunState = field(init=False)  # set when the output is locked

    @contextlib.contextmanager
    def phase(self, text: str, in_log: bool = True) -> Iterator[None]:
        """Shows the phase of the run on the console and in `eagleray status`."""
        self.state.enter(text)
        with phase_line(self.console, text, in_log):
            yield

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


def resolve_context(
    config: Config, console: Console, step: str = "", origin: Origin | None = None, *, in_program: bool = False
) -> RunContext:
    """Checks the configuration and resolves it. Writes nothing. Raises `ConfigError`."""
    config.check()
    if config.output.path == STDOUT:
        raise ConfigError(f"output.path={STDOUT} (standard output) is for `eagleray infer` alone", key="output.path")
    check_table(config.output.table)
    groups = replica_groups(config.hardware, config.engine)
    fs, root = resolve(str(config.output.path))
    params, dataset = config.params(), config.dataset
    plan_answer_columns(config.output.columns, params.response_format)  # raises before anything starts
    parser = RowParser.of(config)
    row_reader = RowReader(parser, RequestHasher(config.engine, params), dataset.max_row_bytes)
    piped = None
    if dataset.path == STDIN:
        with phase_line(console, "reading standard input", in_log=False):
            piped = receive(fs, root, str(config.output.path))
        if piped.is_kept:
            console.print(f"The rows are those of the earlier run: {piped.path}.", highlight=False)
    ownership = Ownership.look(config, fs, root, piped)
    stack, interrupts = contextlib.ExitStack(), Interrupts(in_program=in_program)
    cluster = RayCluster(absolute(str(config.output.path)), config.engine, stack, interrupts)
    context = RunContext(
        config, console, params, fs, root, row_reader, groups, ownership, piped, step, stack, interrupts, cluster
    )
    context.origin = origin or context.origin
    return context
