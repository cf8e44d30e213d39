"""Texts that llama.cpp evaluates for tasks that generate nothing, in a context of their own beside the chats' context.

A batch has several texts, each in a sequence of its own. Their token vectors are pooled here; only a classifier's outputs
are pooled by llama.cpp. A value depends on the other texts of the batch only by rounding.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.errors import ConfigError, EngineError
from engines.local.gguf_tasks import GGUFHead
from engines.local.llama_library import L, check_decoded, log
from engines.local.llamacpp_batch import TokenBatch
from engines.local.llamacpp_model import LlamaModel
from engines.local.task_values import Vector
from engines.local.text_batches import TextBatches, TextRow

# Tokens of a batch on a CPU. Each text's attention runs over all tokens of its batch, so larger batches are not faster.
_CPU_TOKENS = 256
_MAX_TEXTS = 64  # of a batch


class LlamaTexts(TextBatches):
    """Evaluates texts in a second context of a loaded model. Raises `ConfigError` if there is no memory for it."""

    def __init__(self, model: LlamaModel, head: GGUFHead, kwargs: dict[str, Any]) -> None:
        self.model, self.head = model, head
        self.limit = model.n_ctx  # tokens of a text
        whole = head.encoder or head.pooling == "rank"  # llama.cpp pools, or reads, a whole text at once
        gpu = kwargs.get("n_gpu_layers", 0) != 0
        self.n_batch = max(kwargs.get("n_batch", 512), self.limit if whole else 0)
        self.max_tokens = self.n_batch if gpu else min(self.n_batch, _CPU_TOKENS)
        self.context = self._new_context(kwargs)
        self.memory = L.llama_get_memory(self.context)  # None for an encoder
        self.batch = TokenBatch(self.n_batch)
        self.width = max(1, L.llama_model_n_cls_out(model.handle)) if head.pooling == "rank" else _width(model)
        super().__init__("llamacpp-texts")
        # See `Scheduler`. The context goes before the model.
        atexit.register(self.close)

    def _new_context(self, kwargs: dict[str, Any]) -> Any:
        params = self.model.context_params(kwargs)
        params.embeddings = True
        params.pooling_type = L.LLAMA_POOLING_TYPE_RANK if self.head.pooling == "rank" else L.LLAMA_POOLING_TYPE_NONE
        params.kv_unified = True  # texts of unequal length are computed together
        params.n_seq_max = min(_MAX_TEXTS, L.llama_max_parallel_sequences(), self.n_batch)
        params.n_ctx = max(self.limit, self.n_batch)
        params.n_batch = params.n_ubatch = self.n_batch
        self.n_seq = int(params.n_seq_max)
        context = L.llama_init_from_model(self.model.handle, params)
        if not context:
            reason = f"engine.kwargs: no memory for texts of {self.limit} tokens; lower n_ctx{log.reason()}"
            raise ConfigError(reason, key="engine.kwargs")
        self.model.apply_adapter(context)
        return context

    def close(self) -> None:
        """Stops the thread and frees the context. Can be called twice."""
        super().close()
        if self.context:
            L.llama_free(self.context)
            atexit.unregister(self.close)
        self.context = None

    # --- The thread

    def cut(self, rows: list[TextRow]) -> list[list[TextRow]]:
        batches: list[list[TextRow]] = []
        filled = 0
        for row in sorted(rows, key=lambda row: len(row.tokens)):
            if not batches or filled + len(row.tokens) > self.max_tokens or len(batches[-1]) == self.n_seq:
                batches.append([])
                filled = 0
            batches[-1].append(row)
            filled += len(row.tokens)
        return batches

    def failure(self, row: TextRow, error: Exception) -> Exception:
        return EngineError("engine_crash", str(error)) if isinstance(error, RuntimeError) else error

    def outputs(self, rows: Sequence[TextRow]) -> Sequence[Vector]:
        """The outputs of a classifier for each text."""
        self._decode([(row.tokens, 0) for row in rows], every=True)
        return [self._array(L.llama_get_embeddings_seq(self.context, i), 1)[0].copy() for i in range(len(rows))]

    def vectors(self, rows: Sequence[TextRow]) -> Sequence[Vector]:
        """The pooled token vectors of each text."""
        if len(rows) == 1 and len(rows[0].tokens) > self.n_batch:
            return [self._long_vector(rows[0].tokens)]
        self._decode([(row.tokens, 0) for row in rows], every=True)
        found = self._array(L.llama_get_embeddings(self.context), self.batch.n)
        ends = np.cumsum([len(row.tokens) for row in rows])
        return [_pooled(part, self.head.pooling) for part in np.split(found, ends[:-1])]

    def _long_vector(self, tokens: list[int]) -> Vector:
        """The vector of a text with more tokens than a batch: a decoder reads it in parts."""
        parts = []
        for at in range(0, len(tokens), self.n_batch):
            self._decode([(tokens[at : at + self.n_batch], at)], every=True)
            parts.append(self._array(L.llama_get_embeddings(self.context), self.batch.n).copy())
        return _pooled(np.concatenate(parts), self.head.pooling)

    def _decode(self, texts: list[tuple[list[int], int]], every: bool) -> None:
        """Evaluates texts, or a part of one text that begins at a later position."""
        if self.memory and not texts[0][1]:
            L.llama_memory_clear(self.memory, False)
        self.batch.n = 0
        for seq, (tokens, start) in enumerate(texts):
            self.batch.add(tokens, start, seq, True)
        if every:
            self.batch.logits[: self.batch.n] = 1
        check_decoded(L.llama_decode(self.context, self.batch.struct))

    def _array(self, pointer: Any, count: int) -> Vector:
        return np.ctypeslib.as_array(pointer, (count, self.width))


def _width(model: LlamaModel) -> int:
    return int(L.llama_model_n_embd(model.handle))


def _pooled(vectors: Vector, pooling: str | None) -> Vector:
    """One vector of a text's token vectors (tokens, width); a copy."""
    if pooling == "cls":
        return np.array(vectors[0])
    if pooling == "last":
        return np.array(vectors[-1])
    return np.asarray(vectors.mean(0, dtype=np.float64), dtype=np.float32)
