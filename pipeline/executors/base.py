"""The contract of executors: rows in, durable records out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engines.config import EngineConfig, Price
from engines.errors import Finding
from engines.types import Request
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
    unfinished: str | None = None  # why the provider still works: the run ends without an output (exit status 4)


class Preview(ABC):
    """What a kind of executor would do with the requests of a dry run."""

    @abstractmethod
    def add(self, request: Request) -> None:
        """Counts a request that would be sent."""

    @abstractmethod
    def lines(self) -> Iterable[tuple[str, str]]:
        """Titles and sentences for the dry run's table."""


class Executor(ABC):
    """Sends the rows of a run, and makes a record of each durable in the ledger.

    `tests/support/length_executor.py` is a small example. The duties of `execute`:

    1. Read each split with `read_split` (`requests.py`). It leaves out the rows whose results are in `known.index`, and
       fills the `SplitSummary` of the split, which `Execution` returns. Pass on `dataset.on_bad_input`. If one process
       reads all splits in order, pass one `Occurrences` to all calls.
    2. Drop rows whose key was seen before, in any split, with `DedupFilter` (`pipeline/storage/ledger_index.py`).
    3. Make the engine's request of a row with `request_of` (`requests.py`). Write each result as a `Record` with
       `write_segment` (`pipeline/storage/ledger.py`). An engine sets `cost_usd` of its completions.
    4. Call `context.state.begin_pass()`, then set `context.state.status` to a `RunStatus` and keep it up to date: the rows
       that were read (from the summaries), the counts of requests, tokens and costs (`SUMS`), one error of each type
       (`first_errors`), and `fed` when all rows are read. `RowCounter` (`row_counter.py`) counts the rows, because a
       request may serve several.
    5. Keep the spending within `run.budget_usd` with `CostBudget` (`cost_budget.py`).
    6. Raise the `Stopped` that `stop_reason` (`stop_reasons.py`) returns. Enter `note_signals(context.interrupts)`
       (`pipeline/signals.py`), and raise `Interrupted` after a signal. What is answered by then must be durable. A wrong
       configuration raises `ConfigError`.

    It may leave rows without a record: the run makes another pass for them.
    """

    price_name = ""  # of its requests' price if it differs from the live price, such as " for batches"

    def __init__(self, context: RunContext) -> None:
        self.context = context

    @classmethod
    def followed_by(cls, config: Config) -> Sequence[str]:
        """The names of the executors that take the rows which this one leaves without an answer."""
        return ()

    @classmethod
    def findings(cls, config: Config) -> list[Finding]:
        """Problems of the configuration that make a run with this kind of executor impossible."""
        return []

    @classmethod
    def preview(cls, config: Config) -> Preview | None:
        """Counts what a dry run should say beside the requests themselves. Called if there are no `findings`."""
        return None

    @classmethod
    def price(cls, engine: EngineConfig) -> Price:
        """The price of this kind's requests."""
        return engine.price

    @classmethod
    def clear(cls, context: RunContext) -> None:
        """Removes what this kind of executor keeps in the output, for `run.resume=false`. Raises `ConfigError` if that
        would lose work under way. Called for every kind, whichever the run uses."""

    @classmethod
    def manifest_entries(cls, context: RunContext) -> dict[str, Any]:
        """Entries of the manifest about what this kind of executor did for the output, in all runs."""
        return {}

    @property
    def under_way(self) -> bool:
        """True if work of earlier runs goes on elsewhere, whose results belong into the ledger."""
        return False

    def begin(self) -> None:
        """Begins work that takes long and needs only the configuration, in the background. The run may still end before
        it asks anything."""

    def prepare(self) -> None:
        """Starts what takes long to start. Called once, for the first executor of a run; an executor that follows another
        one starts in `execute`."""

    @abstractmethod
    def execute(self, inputs: SplitInput, known: LedgerSnapshot) -> Execution:
        """Makes a record durable for the rows of `inputs` that `known` does not have."""

    def close(self) -> None:
        """Releases connections at the end of the run."""

    def warn_of_torn(self, index: Index) -> None:
        """Names the segments that could not be read."""
        for path in index.torn:
            warn(self.context.console, f"{path} cannot be read; its rows are asked again.")
