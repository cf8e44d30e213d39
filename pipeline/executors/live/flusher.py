"""Writes the results of one worker into the ledger, and merges its segments."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.executors.live.byte_limits import SEGMENT_BYTES, UNWRITTEN_BYTES
from pipeline.executors.live.recorder import RowRecorder, by_lease
from pipeline.monitor.status import RunStatus
from pipeline.storage.ledger import Compactor, Record, write_segment

# Reports rows that are durable, and the counts to add to those of the run.
Commit = Callable[[list[tuple[int, list[int]]], RunStatus], Awaitable[None]]


class Flusher:
    """Writes a segment every `flush_s`, and at once if the results are large or `now` is set. Segments are merged in
    another thread, so that a slow merge delays no segment."""

    def __init__(
        self, fs: pafs.FileSystem, root: str, writer: str, recorder: RowRecorder, flush_s: float, commit: Commit
    ) -> None:
        self.fs, self.root, self.writer = fs, root, writer
        self.recorder, self.flush_s, self.commit = recorder, flush_s, commit
        self.now = asyncio.Event()
        self.flushing = asyncio.Lock()
        self.written: list[Record] = []  # taken by the metrics
        self.compactor = Compactor(fs, root, writer)
        self.to_merge: asyncio.Queue[str | None] = asyncio.Queue()
        self.ending = False

    def check_size(self) -> None:
        """Starts a flush if the recorder's results are large."""
        if self.recorder.unwritten >= SEGMENT_BYTES:
            self.now.set()

    @property
    def full(self) -> bool:
        """True if so many results wait to be written that no row may enter the engine."""
        return self.recorder.unwritten >= UNWRITTEN_BYTES

    async def flush_often(self, after: Callable[[], Awaitable[None]]) -> None:
        """Flushes repeatedly, and calls `after` each time. Ends only if it is cancelled or a write fails."""
        while True:
            with contextlib.suppress(TimeoutError):
                # Not `wait_for`: in Python 3.11, it loses a cancellation that comes together with the event.
                async with asyncio.timeout(self.flush_s):
                    await self.now.wait()
            self.now.clear()
            await self.flush()
            await after()

    async def flush(self) -> None:
        """Makes all results durable. Raises `OSError` if the disk or store fails in each of three tries."""
        async with self.flushing:
            if not self.recorder.records:
                return
            records, places = self.recorder.take_records()
            size, answers = self.recorder.unwritten, [record.completion for record in records]
            try:
                path = await self._write(records)
            except BaseException:  # a later flush may succeed. A record that is written twice counts once.
                self.recorder.put_back(records, places)
                raise
            finally:
                for record, place, answer in zip(records, places, answers, strict=True):
                    if record.completion is not answer and answer.error is None:
                        self.recorder.count_unwritable(record, place)
            self.recorder.unwritten -= size
            self.written += records
            await self.commit(by_lease(places), self.recorder.take_counts())
            self.to_merge.put_nowait(path)

    async def _write(self, records: list[Record]) -> str:
        for wait in (0.5, 2.0):
            with contextlib.suppress(OSError):
                return await asyncio.to_thread(write_segment, self.fs, self.root, self.writer, records)
            await asyncio.sleep(wait)
        return await asyncio.to_thread(write_segment, self.fs, self.root, self.writer, records)

    async def merge_often(self) -> None:
        """Merges segments until `end`. Durability does not need it: a failing store or a damaged segment ends no run."""
        while (path := await self.to_merge.get()) is not None:
            if not self.ending:
                with contextlib.suppress(OSError, pa.ArrowException, LookupError, TypeError, ValueError):
                    await asyncio.to_thread(self.compactor.add, path)

    def end(self) -> None:
        """Ends `merge_often`, after the merge that is running: segments must not vanish while others read the ledger."""
        self.ending = True
        self.to_merge.put_nowait(None)

    def take_written(self) -> list[Record]:
        written, self.written = self.written, []
        return written
