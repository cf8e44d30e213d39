"""Texts that a model evaluates in batches, in one thread: for tasks that generate nothing.

The thread takes all texts that wait and cuts them into batches. While it evaluates them, the next texts come in.
"""

from __future__ import annotations

import contextlib
import queue
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from engines.errors import EngineError
from engines.local.batch_thread import GATHER_S, BatchThread
from engines.types import Completion
from engines.usage import Usage


@dataclass(slots=True, eq=False)
class TextRow:
    """One text that a model evaluates."""

    tokens: list[int]
    evaluate: Callable[[Sequence[TextRow]], Sequence[Any]]  # gives the results of a batch of rows with the same function
    types: list[int] | None = None  # token types, for a model that marks the first and the second text of a pair
    start: int = 0  # log likelihood: the place of the completion's first token. Embedding: the length of the prompt
    cached: int = 0  # tokens that were not evaluated, because another row of the batch had them
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0  # `time.perf_counter()` when a batch took it
    future: Future[Any] = field(default_factory=Future)

    def settle(self, result: Any) -> None:
        """Hands the result, or the error, to the caller, unless the caller has cancelled."""
        with contextlib.suppress(InvalidStateError):
            if isinstance(result, BaseException):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)


class TextBatches(BatchThread[TextRow]):
    """Evaluates rows in its own thread. A subclass cuts them into batches and evaluates a batch."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.thread.start()

    # --- The thread

    @abstractmethod
    def cut(self, rows: list[TextRow]) -> list[list[TextRow]]:
        """The rows in batches."""

    def run(self, rows: list[TextRow]) -> Sequence[Any]:
        """The results of a batch. May raise any exception."""
        return rows[0].evaluate(rows)

    def failure(self, row: TextRow, error: Exception) -> Exception:
        """The error of a row that fails alone."""
        return error

    def _loop(self) -> None:
        rows: list[TextRow] = []
        while not self.stopped.is_set():
            rows = self._receive(wait=True)
            try:
                for batch in self.cut([row for row in rows if not row.future.done()]):
                    if self.stopped.is_set():
                        break
                    self._evaluate(batch)
            except BaseException as error:  # a bug, ours or the library's: the callers get it, the engine continues
                for row in rows:
                    row.settle(error)
        for row in [*rows, *self._receive(wait=False)]:
            row.settle(EngineError("cancelled", "the engine was closed before this request was answered"))

    def _receive(self, wait: bool) -> list[TextRow]:
        """All rows of the inbox. If `wait`, waits for the first one, and until no more arrive."""
        rows: list[TextRow] = []
        with contextlib.suppress(queue.Empty):
            while True:
                patience = (GATHER_S if rows else None) if wait and not self.stopped.is_set() else 0
                row = self.inbox.get(timeout=patience) if patience != 0 else self.inbox.get_nowait()
                if row is not None:
                    rows.append(row)
        return rows

    def _evaluate(self, rows: list[TextRow]) -> None:
        """Evaluates a batch. If it fails, evaluates its halves, so that only the row that causes it fails."""
        rows = [row for row in rows if not row.future.done()]
        if not rows:
            return
        for row in rows:
            row.started = row.started or time.perf_counter()
        try:
            for row, result in zip(rows, self.run(rows), strict=True):
                row.settle(result)
            return
        except Exception as error:
            failed = error.with_traceback(None)  # the traceback would hold the batch's memory
        if len(rows) == 1:
            return rows[0].settle(self.failure(rows[0], failed))
        self._evaluate(rows[: len(rows) // 2])
        self._evaluate(rows[len(rows) // 2 :])


def values_of(values: dict[str, Any], rows: Sequence[TextRow]) -> Completion:
    """The completion of a request that these rows answer."""
    usage = Usage(sum(len(row.tokens) for row in rows), cached_input=sum(row.cached for row in rows))
    waited = min(row.started for row in rows) - min(row.submitted for row in rows)
    return Completion(values=values, usage=usage, queued_s=max(0.0, waited))
