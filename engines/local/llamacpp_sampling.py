"""Sampling and token batches for `engines/local/llamacpp.py`."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from engines.local.gguf import log

# isort: split
# After engines.local.gguf, which sets how llama.cpp's threads wait.
import llama_cpp as L

from engines.errors import EngineError, invalid
from engines.local.grammar import to_gbnf
from engines.params import GenerationParams


class Sampler:
    """How one answer's tokens are picked. Owned by the loop thread once its sequence is admitted."""

    def __init__(self, vocab: Any, n_vocab: int, g: GenerationParams, prompt: list[int], seed: int, limit: int) -> None:
        temperature = g.temperature or 0.0
        repetition = g.repetition_penalty or 1.0
        frequency, presence = g.frequency_penalty or 0.0, g.presence_penalty or 0.0
        # The most likely token, as the model has it: no chain needed.
        self.plain = temperature == 0.0 and not (g.logit_bias or repetition != 1.0 or frequency or presence)
        self.grammar = None
        self.chain = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())

        def add(stage: Any) -> None:
            L.llama_sampler_chain_add(self.chain, stage)  # which now owns it

        if g.response_format is not None:
            gbnf = to_gbnf(g.response_format).encode()
            log.errors.clear()
            # NULL for what it cannot parse, left recursion included; an empty text would be taken for "anything".
            self.grammar = L.llama_sampler_init_grammar(vocab, gbnf, b"root")
            if not self.grammar:
                raise invalid(f"the grammar of response_format is not valid{log.reason()}")
        if g.logit_bias:
            biases = (L.llama_logit_bias * len(g.logit_bias))()
            for i, (name, bias) in enumerate(g.logit_bias.items()):
                if not 0 <= int(name) < n_vocab:
                    raise invalid(f"logit_bias names token {name}; the model has {n_vocab}")
                biases[i] = L.llama_logit_bias(int(name), bias)
            add(L.llama_sampler_init_logit_bias(n_vocab, len(biases), biases))
        if repetition != 1.0:
            stage = L.llama_sampler_init_penalties(n_vocab, len(prompt) + limit, repetition, 0.0, 0.0)
            for token in prompt:
                L.llama_sampler_accept(stage, token)
            add(stage)
        if frequency or presence:
            add(L.llama_sampler_init_penalties(n_vocab, limit, 1.0, frequency, presence))
        if temperature == 0.0:
            add(L.llama_sampler_init_greedy())
        else:
            if g.top_k is not None and g.top_k > 0:
                add(L.llama_sampler_init_top_k(g.top_k))
            if g.top_p is not None and g.top_p < 1.0:
                add(L.llama_sampler_init_top_p(g.top_p, 1))
            if g.min_p:
                add(L.llama_sampler_init_min_p(g.min_p, 1))
            add(L.llama_sampler_init_temp(temperature))
            # 2**32 - 1 is llama.cpp's "choose one for me".
            add(L.llama_sampler_init_dist(seed % 0xFFFFFFFF))

    def free(self) -> None:
        for sampler in (self.chain, self.grammar):
            if sampler:
                L.llama_sampler_free(sampler)
        self.chain = self.grammar = None

    __del__ = free


class Candidates:
    """llama.cpp's array of (id, logit, probability), over one buffer that is filled anew for each use."""

    def __init__(self, n_vocab: int) -> None:
        self.ids = np.arange(n_vocab, dtype=np.int32)
        self.buffer = np.zeros(n_vocab, dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self.pointer = self.buffer.ctypes.data_as(L.llama_token_data_p)

    def apply(self, ids: Any, logits: Any, *samplers: Any) -> tuple[int, float]:
        """What the samplers select, (id, logit); -inf where nothing is left. Without a selecting one: the best."""
        size = len(ids)
        self.buffer["id"][:size] = ids
        self.buffer["logit"][:size] = logits
        self.buffer["p"][:size] = 0.0
        array = L.llama_token_data_array(self.pointer, size, -1, False)
        for sampler in samplers:
            L.llama_sampler_apply(sampler, ctypes.byref(array))
        at = array.selected
        if at < 0:
            at = int(self.buffer["logit"][: array.size].argmax())
        chosen = self.buffer[at]
        return int(chosen["id"]), float(chosen["logit"])

    def pick(self, sampler: Sampler, row: Any) -> int:
        """One token of a sampler with a grammar.

        The grammar looks at one token before it looks at all of them (7 ms for 49,152): most picks are allowed.
        For a draw this is exact too: p(x) + p(refused) · p(x) / p(allowed) = p(x) / p(allowed).
        """
        if sampler.plain:
            best = row.argpartition(-64)[-64:] if len(row) > 64 else self.ids
            token, logit = self.apply(best, row[best], sampler.grammar)
        else:
            token, _ = self.apply(self.ids, row, sampler.chain)
            token, logit = self.apply(np.array([token]), row[[token]], sampler.grammar)
        if logit == -np.inf:
            samplers = (sampler.grammar,) if sampler.plain else (sampler.grammar, sampler.chain)
            token, logit = self.apply(self.ids, row, *samplers)
        if logit == -np.inf:  # accepting it all the same would abort the process inside llama.cpp
            raise EngineError("bad_response", "the grammar of response_format allows none of the model's tokens here")
        L.llama_sampler_accept(sampler.chain, token)
        L.llama_sampler_accept(sampler.grammar, token)
        return token


class TokenBatch:
    """A `llama_batch` over numpy arrays: filling it is a slice assignment, not a Python loop over ctypes."""

    def __init__(self, size: int) -> None:
        self.n = 0
        self.token = np.zeros(size, np.int32)
        self.pos = np.zeros(size, np.int32)
        self.seq = np.zeros(size, np.int32)
        self.ones = np.ones(size, np.int32)
        self.logits = np.zeros(size, np.int8)
        self.seq_pointers = (self.seq.ctypes.data + 4 * np.arange(size)).astype(np.uintp)  # each token's list of one
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
        """Adds a run of one sequence's tokens; `output`: the logits after its last one are wanted."""
        end = self.n + len(tokens)
        self.token[self.n : end] = tokens
        self.pos[self.n : end] = np.arange(start, start + len(tokens), dtype=np.int32)
        self.seq[self.n : end] = seq
        self.logits[self.n : end] = 0
        self.logits[end - 1] = output
        self.n = end
