"""The records of one worker on their way into the ledger, and the counts that the dispatcher gets with them."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass

from engines.config import EngineConfig
from engines.types import Completion
from pipeline.monitor.status import RunStatus, UsageStats
from pipeline.storage.exact_json import dumps
from pipeline.storage.ledger import Record

logger = logging.getLogger(__name__)

# Lease -> offsets of rows in it.
Places = dict[int, list[int]]


@dataclass(slots=True)
class LeasedRow:
    """A row that the worker holds."""

    lease: int
    offset: int  # in the lease
    deaths: int  # of engine processes that had this row inside
    key: bytes
    id: str
    request: bytes
    since: float = 0.0  # when it came here (monotonic)
    charged: float = 0.0  # US$ of its failed tries that the budget has counted


class RowRecorder:
    """Collects records until the worker flushes them."""

    def __init__(self, engine: EngineConfig, overhead: int) -> None:
        self.engine, self.overhead = engine, overhead  # overhead: bytes that every prompt has beside the row's own
        self.done = 0  # rows recorded so far
        self.completed: Places = {}  # rows that came out of the engine since the last pull
        self.records: list[Record] = []
        self.places: Places = {}  # the rows of `records`, without superseded tries
        self.counts = RunStatus()

    def record(self, row: LeasedRow, completion: Completion) -> None:
        """The final result of a row."""
        completion.attempts += row.deaths
        self.done += 1
        self.records.append(Record(row.key, row.id, completion, time.time()))
        self.places.setdefault(row.lease, []).append(row.offset)
        self.completed.setdefault(row.lease, []).append(row.offset)
        counts = self.counts
        counts.input_tokens += completion.usage.input
        counts.output_tokens += completion.usage.output
        self._charge(row, completion)
        if completion.usage.input or completion.usage.output:  # an answer of the wrong shape teaches as much
            self._learn(row, completion)
        if completion.error is None:
            counts.done += 1
            return
        event = {"event": "row failed", "key": row.key.hex(), "id": row.id, **asdict(completion.error)}
        logger.warning("%s", dumps({**event, "attempts": completion.attempts}).decode())
        counts.failed += 1
        counts.errors[completion.error.type] += 1
        counts.first_errors.setdefault(completion.error.type, f"{row.id}: {completion.error.message}")

    def record_tries(self, row: LeasedRow, completion: Completion) -> None:
        """The tries of a row that goes back to the dispatcher and is asked again: they may have to be paid."""
        if completion.cost_usd == 0 and not (self.engine.provider and completion.attempts):
            return
        self.supersede(row, completion)
        self._charge(row, completion)

    def supersede(self, row: LeasedRow, completion: Completion) -> None:
        """A try that answers no row, for the ledger alone."""
        self.records.append(Record(row.key, row.id, completion, time.time(), superseded=True))

    def _charge(self, row: LeasedRow, completion: Completion) -> None:
        """Adds the cost of a row; the budget gets it without what it has counted."""
        counts = self.counts
        if completion.cost_usd is None:
            counts.cost_unknown += 1
            counts.unpriced.append((row.lease, row.offset))
        else:
            counts.cost_usd += completion.cost_usd
            counts.spent += completion.cost_usd - row.charged

    def _learn(self, row: LeasedRow, completion: Completion) -> None:
        """Improves the estimates of the budget by an answer."""
        usage = completion.usage
        size = len(row.request) + self.overhead
        each = -(-usage.output // max(1, len(completion.choices)))
        self.counts.seen.add(UsageStats(1, usage.input / size if size else 0.0, each))

    # -- what the worker takes -----------------------------------------------------------------------------------------

    def take_completed(self) -> list[tuple[int, list[int]]]:
        completed, self.completed = list(self.completed.items()), {}
        return completed

    def take_records(self) -> tuple[list[Record], list[tuple[int, list[int]]]]:
        """The records to write, and the places of their rows."""
        records, self.records = self.records, []
        places, self.places = list(self.places.items()), {}
        return records, places

    def put_back(self, records: list[Record], places: list[tuple[int, list[int]]]) -> None:
        """These could not be written."""
        self.records = records + self.records
        for lease, offsets in places:
            self.places.setdefault(lease, []).extend(offsets)

    def take_counts(self) -> RunStatus:
        counts, self.counts = self.counts, RunStatus()
        return counts
