"""Reads the input into the queue: with Ray Data, or in this process where the input is small."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pyarrow as pa

from engines.errors import ConfigError
from pipeline.dataset.reader import ReadSplit, RowReader, SplitSummary
from pipeline.executors.live.ray_dataset import dataset_of
from pipeline.executors.requests import ROWS_SCHEMA, PendingRequest, read_split
from pipeline.storage.ledger_index import DedupFilter


class Feed:
    """A thread that reads rows, drops duplicates, and pauses while the queue is full."""

    def __init__(self, splits: list[ReadSplit], reader: RowReader, done: Any, fail_on_bad_input: bool, small: bool) -> None:
        self.splits, self.reader, self.done = splits, reader, done
        self.fail_on_bad_input = fail_on_bad_input
        self.small = small  # so small that the processes of a Ray Dataset would take longer to start than to read it
        self.summaries: dict[int, SplitSummary] = {}
        self.buffer_rows = 0
        self.stopped = False
        self.room = threading.Event()
        self.room.set()

    def start(
        self,
        report: Any,
        buffer_rows: int,
        add: Callable[[list[PendingRequest], int], Coroutine[Any, Any, None]],
        end: Callable[[str | None], Coroutine[Any, Any, None]],
    ) -> None:
        """Starts the thread. It calls, in the running event loop, `add(rows, duplicates)` for the new rows of each table,
        and at last `end(reason)`, where `reason` is None or the error that ended the reading.

        `report` is the remote method that takes the summary of each split.
        """
        self.buffer_rows = buffer_rows
        loop = asyncio.get_running_loop()
        seen = DedupFilter()

        def read() -> None:
            reason = None
            try:
                for table in self._tables(report, loop):
                    if not len(table):
                        continue
                    fresh = table.filter(pa.array(seen.add(table["key"])))
                    rows = list(map(PendingRequest, *(fresh[name].to_pylist() for name in ROWS_SCHEMA.names)))
                    asyncio.run_coroutine_threadsafe(add(rows, len(table) - len(fresh)), loop).result()
                    self.room.wait()
                    if self.stopped:
                        break
            except Exception as error:  # the driver ends the run with it
                reason = _why(error)
            asyncio.run_coroutine_threadsafe(end(reason), loop).result()

        threading.Thread(target=read, name="feed", daemon=True).start()

    def limit(self, queued: int) -> None:
        """Pauses reading while `queued` rows fill the buffer."""
        if queued < self.buffer_rows or self.stopped:
            self.room.set()
        else:
            self.room.clear()

    def stop(self) -> None:
        self.stopped = True
        self.room.set()

    def _tables(self, report: Any, loop: asyncio.AbstractEventLoop) -> Iterator[pa.Table]:
        """The rows to ask, read in the thread."""
        if not self.small:
            dataset = dataset_of(self.splits, self.reader, self.done, self.fail_on_bad_input, report)
            yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
            return
        import ray

        done = ray.get(self.done)
        for split in self.splits:
            summary = SplitSummary()
            yield from read_split(split, self.reader, done, self.fail_on_bad_input, summary)
            loop.call_soon_threadsafe(self.summaries.__setitem__, split.number, summary)


def _why(error: Exception) -> str:
    cause: Any = error
    while getattr(cause, "cause", None) is not None:  # Ray wraps the exception of a task
        cause = cause.cause
    return str(cause) if isinstance(cause, ConfigError) else f"{type(cause).__name__}: {cause}"
