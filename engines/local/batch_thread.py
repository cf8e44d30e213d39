"""The thread of an engine that evaluates rows in batches."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from engines.errors import EngineError

# Requests that are sent together arrive one by one. A batch starts when no request has arrived for this long, in seconds.
GATHER_S = 0.01

Row = TypeVar("Row")


class BatchThread(ABC, Generic[Row]):
    """Takes rows in an inbox, from any thread. A subclass calls `thread.start()` when it is ready."""

    def __init__(self, name: str) -> None:
        self.inbox: queue.SimpleQueue[Row | None] = queue.SimpleQueue()  # None wakes the thread
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def submit(self, rows: Sequence[Row]) -> None:
        """Queues rows; their futures get the results. Raises `EngineError("cancelled")` if this object is closed."""
        for row in rows:
            self.inbox.put(row)
        if self.stopped.is_set():  # after the put: the thread settles every row that came before `stopped` was set
            raise EngineError("cancelled", "the engine is closed")

    def close(self) -> None:
        """Stops the thread. Rows that run or wait fail with "cancelled". Can be called twice."""
        self.stopped.set()
        self.inbox.put(None)
        self.thread.join()

    @abstractmethod
    def _loop(self) -> None:
        """Evaluates the rows of the inbox until `stopped` is set, then fails the rest."""
