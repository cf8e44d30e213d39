"""The records of one worker on their way into the ledger, and the counts that the dispatcher gets with them."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from engines.config import EngineConfig
from engines.errors import Failure
from engines.text import encodable
from engines.types import Completion
from pipeline.executors.live.byte_limits import result_bytes
from pipeline.monitor.status import RunStatus, UsageStats
from pipeline.storage.exact_json import dumps
from pipeline.storage.ledger import Record

logger = logging.getLogger(__name__)

# A row's lease, and its offset in it.
Place = tuple[int, int]


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
    round: int = 0  # see `MemoryLimit`
    limit_before: int = 0  # requests at once, before memory ran out with this row inside; 0: it never did


class RowRecorder:
    """Collects records until the worker flushes them."""

    def __init__(self, engine: EngineConfig, overhead: int, budget: bool = True) -> None:
        """`overhead`: bytes that every prompt has beside the row's own. `budget`: the run has one."""
        self.engine, self.overhead, self.budget = engine, overhead, budget
        self.done = 0  # rows recorded so far
        self.completed: list[Place] = []  # rows that came out of the engine since the last pull
        self.records: list[Record] = []
        self.places: list[Place | None] = []  # the rows of `records`; None for a superseded try
        self.counts = RunStatus()
        self.unwritten = 0  # bytes of the results that are not durable yet

    def record(self, row: LeasedRow, completion: Completion) -> None:
        """The final result of a row."""
        completion.attempts += row.deaths
        self.done += 1
        place = (row.lease, row.offset)
        record = Record(row.key, row.id, completion, time.time())
        self._add(record, place)
        self.completed.append(place)
        counts, usage = self.counts, completion.usage
        counts.input_tokens += usage.input
        counts.output_tokens += usage.output
        counts.sent += completion.attempts
        self._charge(row, completion)
        if self.budget and (usage.input or usage.output):  # an answer with a wrong shape counts too
            self._learn(row, completion)
        if completion.error is not None:
            self._count_failure(record, completion.error, place)
            return
        counts.done += 1
        if completion.finish_reason == "length":
            counts.truncations.append(place)

    def _count_failure(self, record: Record, error: Failure, place: Place) -> None:
        error = replace(error, message=encodable(error.message))
        event = {"event": "row failed", "key": record.key.hex(), "id": record.id, **asdict(error)}
        logger.warning("%s", dumps({**event, "attempts": record.completion.attempts}).decode())
        self.counts.failed += 1
        self.counts.failures.append((*place, error.type))
        self.counts.first_errors.setdefault(error.type, f"{record.id}: {error.message}")

    def count_unwritable(self, record: Record, place: Place | None) -> None:
        """Corrects the counts of an answer in whose place the ledger has a failure (`write_segment`)."""
        if place is None or record.completion.error is None:
            return
        self.counts.done -= 1
        if place in self.counts.truncations:
            self.counts.truncations.remove(place)
        self._count_failure(record, record.completion.error, place)

    def record_tries(self, row: LeasedRow, completion: Completion) -> None:
        """Records the tries of a row that goes back to the dispatcher and is asked again, if they may cost something."""
        if completion.cost_usd == 0 and not (self.engine.provider and completion.attempts):
            return
        self.supersede(row, completion)
        self._charge(row, completion)

    def supersede(self, row: LeasedRow, completion: Completion) -> None:
        """Records a try that answers no row. Only the ledger needs it."""
        self.counts.sent += completion.attempts
        self._add(Record(row.key, row.id, completion, time.time(), superseded=True), None)

    def _add(self, record: Record, place: Place | None) -> None:
        self.records.append(record)
        self.places.append(place)
        self.unwritten += result_bytes(record.completion)

    def _charge(self, row: LeasedRow, completion: Completion) -> None:
        """Adds the cost of a row. The budget gets only the part that it has not counted yet."""
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

    # -- taken by the worker -------------------------------------------------------------------------------------------

    def take_completed(self) -> list[tuple[int, list[int]]]:
        completed, self.completed = self.completed, []
        return by_lease(completed)

    def take_records(self) -> tuple[list[Record], list[Place | None]]:
        """The records to write, and the places of their rows."""
        records, self.records = self.records, []
        places, self.places = self.places, []
        return records, places

    def put_back(self, records: list[Record], places: list[Place | None]) -> None:
        """Takes back records that could not be written."""
        self.records, self.places = records + self.records, places + self.places

    def take_counts(self) -> RunStatus:
        counts, self.counts = self.counts, RunStatus()
        return counts


def by_lease(places: Iterable[Place | None]) -> list[tuple[int, list[int]]]:
    """Each lease with the offsets of its rows."""
    found = defaultdict[int, list[int]](list)
    for place in places:
        if place is not None:
            found[place[0]].append(place[1])
    return list(found.items())
