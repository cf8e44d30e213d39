"""Reads the input into the queue: with Ray Data, or in this process if the input is small."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pyarrow as pa

from engines.errors import ConfigError
from pipeline.dataset.arrow_rows import to_values
from pipeline.dataset.occurrences import Occurrences
from pipeline.dataset.reader import ReadSplit, RowReader, SplitSummary
from pipeline.executors.live.byte_limits import BUFFER_BYTES, BUFFER_ROWS
from pipeline.executors.live.ray_dataset import dataset_of
from pipeline.executors.live.remote_index import reference_to
from pipeline.executors.requests import ROWS_SCHEMA, PendingRequest, read_split
from pipeline.storage.ledger_index import DedupFilter

# The counts of a summary that the status of a run shows.
COUNTS = ("rows", "invalid", "answered", "failed", "truncated")


class Feed:
    """A thread that reads rows, drops duplicates, and pauses while the queue is full."""

    def __init__(self, splits: list[ReadSplit], reader: RowReader, done: Any, fail_on_bad_input: bool, small: bool) -> None:
        self.splits, self.reader, self.done = splits, reader, done
        self.fail_on_bad_input = fail_on_bad_input
        self.small = small  # so small that the processes of a Ray Dataset would take longer to start than to read it
        self.summaries: dict[int, SplitSummary] = {}
        self.totals = Counter[str]()  # the sums of `COUNTS` over the summaries: the driver asks for them all the time
        self.stopped = False
        self.room = threading.Event()
        self.room.set()

    def start(
        self,
        report: Any,
        add: Callable[[list[PendingRequest], list[bytes]], Coroutine[Any, Any, None]],
        end: Callable[[str | None], Coroutine[Any, Any, None]],
    ) -> None:
        """Starts the thread. It calls, in the running event loop, `add(rows, duplicates)` for the new rows of each table
        and the keys of the other rows, and finally `end(reason)`, where `reason` is None or the error that ended the
        reading.

        `report` is the remote method that takes the summary of each split.
        """
        loop = asyncio.get_running_loop()
        seen = DedupFilter()

        def read() -> None:
            reason = None
            try:
                for table in self._tables(report, loop):
                    if not len(table):
                        continue
                    rows, duplicates = new_requests(table, seen)
                    asyncio.run_coroutine_threadsafe(add(rows, duplicates), loop).result()
                    self.room.wait()
                    if self.stopped:
                        break
            except Exception as error:  # the driver ends the run with it
                reason = _reason_of(error)
            asyncio.run_coroutine_threadsafe(end(reason), loop).result()

        threading.Thread(target=read, name="feed", daemon=True).start()

    def report(self, number: int, summary: SplitSummary) -> None:
        """Takes the summary of a split. If it comes again, the last one counts."""
        before = self.summaries.get(number, SplitSummary())
        self.summaries[number] = summary
        for name in COUNTS:
            self.totals[name] += getattr(summary, name) - getattr(before, name)

    def limit(self, rows: int, size: int) -> None:
        """Pauses reading while this number of rows and bytes in the queue is too large."""
        if (rows < BUFFER_ROWS and size < BUFFER_BYTES) or self.stopped:
            self.room.set()
        else:
            self.room.clear()

    def stop(self) -> None:
        self.stopped = True
        self.room.set()

    def _tables(self, report: Any, loop: asyncio.AbstractEventLoop) -> Iterator[pa.Table]:
        """The rows to ask, read in the thread."""
        import ray

        if not self.small:
            done = reference_to(self.done)
            dataset = dataset_of(self.splits, self.reader, done, self.fail_on_bad_input, report)
            yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
            return
        done = ray.get(self.done) if isinstance(self.done, ray.ObjectRef) else self.done
        occurrences = Occurrences()
        for split in self.splits:
            summary = SplitSummary()
            yield from read_split(split, self.reader, done, self.fail_on_bad_input, summary, occurrences)
            loop.call_soon_threadsafe(self.report, split.number, summary)


def new_requests(table: pa.Table, seen: DedupFilter) -> tuple[list[PendingRequest], list[bytes]]:
    """The rows with new keys, and the keys of the other rows."""
    new = seen.add(table["key"])
    fresh = table if new.all() else table.filter(pa.array(new))
    rows = list(map(PendingRequest, *(to_values(fresh[name]) for name in ROWS_SCHEMA.names)))
    return rows, [] if fresh is table else table["key"].filter(pa.array(~new)).to_pylist()


def _reason_of(error: Exception) -> str:
    cause: Any = error
    while getattr(cause, "cause", None) is not None:  # Ray wraps the exception of a task
        cause = cause.cause
    return str(cause) if isinstance(cause, ConfigError) else f"{type(cause).__name__}: {cause}"
