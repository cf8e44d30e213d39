"""Batches for the tasks of `engine=transformers` that generate nothing: texts of similar length are evaluated together.

All texts that wait are sorted by length, and cut into batches by the number of padded tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from engines.errors import OutOfMemory
from engines.local.text_batches import TextBatches, TextRow

# Padded tokens of a batch. Larger batches are not faster: the matrices are large enough, and leave the CPU's caches.
_CPU_TOKENS = 4096
_GPU_TOKENS = 32768
# Logits of a batch: rows, times positions whose logits are needed, times the size of the vocabulary.
_CPU_LOGITS = 1 << 26
_GPU_LOGITS = 1 << 28


class PaddedBatches(TextBatches):
    """Evaluates at most `max_rows` together. `use` is a context in which the thread may use the model.

    `arrange` sorts rows; it may give them another `evaluate`. `logits` is the number of logits that a row needs.
    """

    def __init__(
        self,
        device: torch.device,
        max_rows: int | None,
        use: Callable[[], contextlib.AbstractContextManager[Any]],
        arrange: Callable[[list[TextRow]], None],
        logits: Callable[[TextRow], int],
    ) -> None:
        cpu = device.type == "cpu"
        self.max_rows, self.use, self.arrange, self.logits = max_rows, use, arrange, logits
        self.max_tokens, self.max_logits = (_CPU_TOKENS, _CPU_LOGITS) if cpu else (_GPU_TOKENS, _GPU_LOGITS)
        super().__init__("eagleray-tasks")

    def cut(self, rows: list[TextRow]) -> list[list[TextRow]]:
        """Longest first, so that a device without enough memory for them shows it at once."""
        self.arrange(rows)
        batches: list[list[TextRow]] = []
        longest = most = 0
        for row in rows:
            size = max(longest, len(row.tokens))
            logits = max(most, self.logits(row))
            batch = batches[-1] if batches else []
            fits = (len(batch) + 1) * size <= self.max_tokens and (len(batch) + 1) * logits <= self.max_logits
            if batch and fits and row.evaluate == batch[0].evaluate and len(batch) < (self.max_rows or len(rows)):
                batch.append(row)
                longest, most = size, logits
            else:
                batches.append([row])
                longest, most = len(row.tokens), self.logits(row)
        return batches

    def run(self, rows: list[TextRow]) -> Sequence[Any]:
        with self.use(), torch.inference_mode():
            return super().run(rows)

    def failure(self, row: TextRow, error: Exception) -> Exception:
        torch.cuda.empty_cache()
        if not isinstance(error, torch.OutOfMemoryError):
            return error
        reason = f"out of device memory on one text with {len(row.tokens)} tokens"
        return OutOfMemory(reason, alone=True)
