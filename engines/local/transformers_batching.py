"""Batches for `engine=transformers`: one thread collects waiting rows and decodes those of similar length together."""

from __future__ import annotations

import contextlib
import queue
import threading

import torch

from engines.errors import EngineError
from engines.local.continuous_batching import ContinuousBatching
from engines.local.transformers_decoding import Decoder
from engines.local.transformers_model import TransformersModel
from engines.local.transformers_row import GenerationRow
from engines.local.vision import image_shapes

# Requests that start together arrive one by one. A batch starts when no request has arrived for this long, in seconds.
_GATHER_S = 0.01
# Prompts of one batch differ in length by at most this number of tokens, or by the length of the oldest row's prompt:
# padding is computed too.
_LENGTH_SLACK = 256


class Batcher:
    """Answers rows in batches of at most `max_batch_size`, in its own thread."""

    def __init__(self, loaded: TransformersModel, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self.stopped = threading.Event()
        self.decoder = Decoder(loaded, self.stopped)
        settings = loaded.continuous_batching
        self.continuous = None if settings is None else ContinuousBatching(loaded.model, settings, self._hand_back)
        self.inbox: queue.SimpleQueue[GenerationRow | None] = queue.SimpleQueue()  # None wakes the thread
        self.waiting: list[GenerationRow] = []  # out of the inbox and in no batch; only the thread uses it
        self.thread = threading.Thread(target=self._loop, name="eagleray-transformers", daemon=True)
        self.thread.start()

    def submit(self, rows: list[GenerationRow]) -> None:
        """Queues rows; their futures get the answers. Raises `EngineError("cancelled")` if the batcher is closed."""
        for row in rows:
            self.inbox.put(row)
        if self.stopped.is_set():  # after the put: the thread answers every row that came before `stopped` was set
            raise EngineError("cancelled", "the engine is closed")

    def close(self) -> None:
        """Stops the thread and drops the model. Rows that run or wait fail with "cancelled". Can be called twice."""
        self.stopped.set()
        self.inbox.put(None)
        self.thread.join()
        self.decoder.model = None
        if self.continuous:
            self.continuous.model = None

    # --- The thread

    def _loop(self) -> None:
        rows: list[GenerationRow] = []
        while not self.stopped.is_set():
            rows = self._next_batch()
            try:
                with self.continuous.paused() if self.continuous and rows else contextlib.nullcontext():
                    self._decode(rows)
            except BaseException as error:  # a bug, ours or the library's: the callers get it, the engine continues
                for row in rows:
                    row.settle(error)
        if self.continuous:
            self.continuous.close()
        self._receive()
        for row in [*rows, *self.waiting]:
            row.settle(EngineError("cancelled", "the engine was closed before this request was answered"))

    def _receive(self) -> None:
        """Empties the inbox. If the waiting rows do not fill a batch, waits for more."""
        with contextlib.suppress(queue.Empty):
            while True:
                closed = self.stopped.is_set()
                patience = 0 if closed or len(self.waiting) >= self.max_batch_size else _GATHER_S
                row = self.inbox.get(timeout=patience if self.waiting or closed else None)
                if row is not None and (row.failed or not self.continuous or not self.continuous.take(row)):
                    self.waiting.append(row)

    def _hand_back(self, row: GenerationRow) -> None:
        """Takes a row at which transformers' continuous batching failed. Called from any thread."""
        row.failed = True
        self.inbox.put(row)

    def _next_batch(self) -> list[GenerationRow]:
        """The oldest waiting row, and rows of similar length with images of equal shapes.

        The waiting rows are sorted by length and cut into batches; the one with the oldest row is next. Taking the rows
        nearest to the oldest would leave the shortest and the longest prompts together for the last batch.
        """
        self._receive()
        self.waiting = [row for row in self.waiting if not row.future.done()]
        if not self.waiting:
            return []
        oldest = self.waiting[0]
        slack = max(_LENGTH_SLACK, len(oldest.prompt))
        alike = [row for row in self.waiting if image_shapes(row) == image_shapes(oldest)]
        order = sorted(alike, key=lambda row: len(row.prompt))
        start = order.index(oldest) // self.max_batch_size * self.max_batch_size
        cut = order[start : start + self.max_batch_size]
        batch = [row for row in cut if abs(len(row.prompt) - len(oldest.prompt)) <= slack]
        self.waiting = [row for row in self.waiting if row not in batch]
        return batch

    def _decode(self, rows: list[GenerationRow]) -> None:
        """Decodes `rows`; in halves if the device has no memory for all of them. Rows keep the tokens they have."""
        rows = [row for row in rows if not row.future.done()]
        if not rows:
            return
        try:
            with torch.inference_mode():
                self.decoder.decode(rows)
            return
        except torch.OutOfMemoryError:
            pass  # continue outside of `except`: the traceback holds the batch's tensors
        except Exception as error:  # a bug, or no memory on a CPU; halving finds the row that causes it
            if len(rows) == 1:
                return rows[0].settle(error)
        torch.cuda.empty_cache()
        if len(rows) == 1:
            reason = f"out of device memory on one request with {len(rows[0].prompt)} prompt tokens"
            rows[0].settle(EngineError("server", reason, retryable=True))
        else:
            self._decode(rows[: len(rows) // 2])
            self._decode(rows[len(rows) // 2 :])
