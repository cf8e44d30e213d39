"""The contract of executors: rows in, durable records out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Config
from pipeline.context import RunContext
from pipeline.dataset.plan import SplitInput
from pipeline.dataset.reader import SplitSummary
from pipeline.monitor.console import warn
from pipeline.monitor.status import RunStatus
from pipeline.storage.ledger_index import Index
from pipeline.storage.ledger_snapshot import LedgerSnapshot


@dataclass(slots=True)
class Execution:
    """The result of one `Executor.execute`."""

    status: RunStatus  # of this call
    summaries: dict[int, SplitSummary] = field(default_factory=dict)  # split number -> what reading it found; all splits
    unfinished: str | None = None  # why work goes on elsewhere: the run ends without an output (exit status 4)


class Executor(ABC):
    """Reads the rows of a run and makes a record of each durable in the ledger.

    An executor owns its waiting, its reasons to stop and its cancellation. It raises `Stopped` to end the run early,
    `Interrupted` after a signal, and `ConfigError`. While it works it keeps `context.state` up to date. It may leave rows
    without a record: the run makes another pass for them.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context

    @classmethod
    def followed_by(cls, config: Config) -> Sequence[str]:
        """The names of the executors that take the rows which this one leaves without an answer."""
        return ()

    @classmethod
    def clear(cls, context: RunContext) -> None:
        """Removes what this kind of executor keeps in the output, for `run.resume=false`. Raises `ConfigError` if that
        would lose work under way. Called for every kind, whichever the run uses."""

    @classmethod
    def manifest_entries(cls, context: RunContext) -> dict[str, Any]:
        """Entries of the manifest about what this kind of executor did for the output, in all runs."""
        return {}

    def prepare(self) -> None:
        """Starts what takes long to start. Called while the input is being listed, before `execute` of the first pass."""

    @abstractmethod
    def execute(self, inputs: SplitInput, known: LedgerSnapshot) -> Execution:
        """Makes a record durable for the rows of `inputs` that `known` does not have."""

    def close(self) -> None:
        """Releases connections at the end of the run."""

    def warn_of_torn(self, index: Index) -> None:
        """Names the segments that could not be read."""
        for path in index.torn:
            warn(self.context.console, f"{path} cannot be read; its rows are asked again.")
