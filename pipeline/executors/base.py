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

    The duties of `execute`:

    1. Read each split with `read_split` (`requests.py`). It fills the `SplitSummary` of the split, which `Execution`
       returns. Pass on `dataset.on_bad_input`.
    2. Drop rows whose key was seen in another split or earlier in this one, with `DedupFilter`.
    3. Call `context.state.enter("asking")` and then set `context.state.status`. Keep the status up to date, and set
       `RunStatus.fed` when all rows are read.
    4. Keep the spending within `run.budget_usd` (`CostBudget`).
    5. Raise the `Stopped` that `stop_reason` returns, and `Interrupted` after `context.interrupts` got a signal. What is
       answered by then must be durable. A wrong configuration raises `ConfigError`.

    It may leave rows without a record: the run makes another pass for them.
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
        """Starts what takes long to start, while the input is being listed. Called once, for the first executor of a run;
        an executor that follows another one starts in `execute`."""

    @abstractmethod
    def execute(self, inputs: SplitInput, known: LedgerSnapshot) -> Execution:
        """Makes a record durable for the rows of `inputs` that `known` does not have."""

    def close(self) -> None:
        """Releases connections at the end of the run."""

    def warn_of_torn(self, index: Index) -> None:
        """Names the segments that could not be read."""
        for path in index.torn:
            warn(self.context.console, f"{path} cannot be read; its rows are asked again.")
