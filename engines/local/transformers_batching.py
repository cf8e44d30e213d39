"""Batches for `engine=transformers`: one thread collects waiting rows and decodes those of similar length together."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator

import torch

from engines.errors import EngineError, OutOfMemory
from engines.local.batch_thread import GATHER_S, BatchThread
from engines.local.continuous_batching import ContinuousBatching
from engines.local.transformers_decoding import Decoder
from engines.local.transformers_model import TransformersModel
from engines.local.transformers_row import GenerationRow
from engines.local.vision import image_shapes

# Prompts of one batch differ in length by at most this number of tokens, or by the length of the oldest row's prompt:
# padding is computed too.
_LENGTH_SLACK = 256


class Batcher(BatchThread[GenerationRow]):
    """Answers rows in batches of at most `max_batch_size`, in its own thread."""

    def __init__(self, loaded: TransformersModel, max_batch_size: int) -> None:
        super().__init__("eagleray-transformers")
        self.max_batch_size = max_batch_size
        self.lowered_to: int | None = None  # `max_batch_size`, if larger batches did not fit into memory
        self.model_lock = threading.Lock()
        self.decoder = Decoder(loaded, self.stopped)
        settings = loaded.continuous_batching
        self.continuous = None if settings is None else ContinuousBatching(loaded.model, settings, self._hand_back)
        self.waiting: list[GenerationRow] = []  # out of the inbox and in no batch; only the thread uses it
        self.thread.start()

    def close(self) -> None:
        """Stops the thread and drops the model. Rows that run or wait fail with "cancelled". Can be called twice."""
        super().close()
        self.decoder.model = None
        if self.continuous:
            self.continuous.model = None

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Inside the context nothing else uses the model. Any thread may enter it."""
        with self.model_lock, self.continuous.paused() if self.continuous else contextlib.nullcontext():
            yield

    # --- The thread

    def _loop(self) -> None:
        rows: list[GenerationRow] = []
        while not self.stopped.is_set():
            rows = self._next_batch()
            try:
                if rows:
                    with self.exclusive():
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
                patience = 0 if closed or len(self.waiting) >= self.max_batch_size else GATHER_S
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

    def _decode(self, rows: list[GenerationRow]) -> bool:
        """Decodes `rows`; in halves if the device has no memory for all of them. Rows keep the tokens they have.

        Later batches are as small, unless a row did not even fit alone: returns False then.
        """
        rows = [row for row in rows if not row.future.done()]
        if not rows:
            return True
        for row in rows:
            row.started = row.started or time.perf_counter()
        lacks_memory = False
        try:
            with torch.inference_mode():
                self.decoder.decode(rows)
            return True
        except torch.OutOfMemoryError:
            lacks_memory = True  # continue outside of `except`: the traceback holds the batch's tensors
        except Exception as error:  # a bug, or no memory on a CPU; halving finds the row that causes it
            if len(rows) == 1:
                rows[0].settle(error)
                return False
        torch.cuda.empty_cache()
        if len(rows) == 1:
            reason = f"out of device memory on one request with {len(rows[0].prompt)} prompt tokens"
            rows[0].settle(OutOfMemory(reason, alone=True))
            return False
        half = len(rows) // 2
        fit = [self._decode(rows[:half]), self._decode(rows[half:])]
        if all(fit) and lacks_memory:
            self.lowered_to = self.max_batch_size = min(self.max_batch_size, len(rows) - half)
        return all(fit)
