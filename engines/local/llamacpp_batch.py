"""The input of `llama_decode`: tokens with their positions and sequences."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from engines.local.llama_library import L


class TokenBatch:
    """A `llama_batch` of at most `size` tokens over numpy arrays: a slice assignment fills it, not a loop over ctypes."""

    def __init__(self, size: int) -> None:
        self.n = 0  # tokens in the batch
        self.token = np.zeros(size, np.int32)
        self.pos = np.zeros(size, np.int32)
        self.seq = np.zeros(size, np.int32)
        self.ones = np.ones(size, np.int32)
        self.logits = np.zeros(size, np.int8)
        # llama.cpp takes a list of sequences per token; each list here has one element.
        self.seq_pointers = (self.seq.ctypes.data + 4 * np.arange(size)).astype(np.uintp)
        self._struct = L.llama_batch()
        for name, array in (
            ("token", self.token),
            ("pos", self.pos),
            ("n_seq_id", self.ones),
            ("seq_id", self.seq_pointers),
            ("logits", self.logits),
        ):
            kind = dict(L.llama_batch._fields_)[name]
            setattr(self._struct, name, ctypes.cast(array.ctypes.data, kind))

    @property
    def struct(self) -> Any:
        self._struct.n_tokens = self.n
        return self._struct

    def add(self, tokens: list[int], start: int, seq: int, output: bool) -> None:
        """Adds consecutive tokens of sequence `seq`, from position `start`. `output`: compute logits after the last one."""
        end = self.n + len(tokens)
        self.token[self.n : end] = tokens
        self.pos[self.n : end] = np.arange(start, start + len(tokens), dtype=np.int32)
        self.seq[self.n : end] = seq
        self.logits[self.n : end] = 0
        self.logits[end - 1] = output
        self.n = end
