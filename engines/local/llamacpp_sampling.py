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
from engines.local.grammar import Grammars, Matcher, text_under
from engines.params import GenerationParams


class Sampler:
    """How one answer's tokens are picked. Owned by the loop thread once its sequence is admitted."""

    def __init__(
        self, vocab: Any, grammars: Grammars, n_vocab: int, g: GenerationParams, prompt: list[int], seed: int, limit: int
    ) -> None:
        temperature = g.temperature or 0.0
        repetition = g.repetition_penalty or 1.0
        frequency, presence = g.frequency_penalty or 0.0, g.presence_penalty or 0.0
        # The most likely token, as the model has it: no chain needed.
        self.plain = temperature == 0.0 and not (g.logit_bias or repetition != 1.0 or frequency or presence)
        self.grammar: Matcher | GBNFSampler | None = None
        self.chain = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())

        def add(stage: Any) -> None:
            L.llama_sampler_chain_add(self.chain, stage)  # which now owns it

        if g.response_format is not None:
            if g.response_format["type"] == "grammar":
                self.grammar = GBNFSampler(vocab, n_vocab, text_under(g.response_format, "grammar", "gbnf"))
            else:
                self.grammar = grammars.matcher(g.response_format)
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
        if self.chain:
            L.llama_sampler_free(self.chain)
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

        The grammar looks at the pick before it looks at all tokens: it allows most picks, and one is cheap to look at.
        For a draw this is exact too: p(x) + p(refused) · p(x) / p(allowed) = p(x) / p(allowed).
        """
        grammar = sampler.grammar
        assert grammar is not None
        token = self._pick(sampler, row)
        if not grammar.allows(token):
            token = self._pick(sampler, grammar.masked(row))
        L.llama_sampler_accept(sampler.chain, token)
        grammar.accept(token)
        return token

    def _pick(self, sampler: Sampler, row: Any) -> int:
        return int(row.argmax()) if sampler.plain else self.apply(self.ids, row, sampler.chain)[0]


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


class GBNFSampler:
    """A grammar in llama.cpp's own language, enforced by llama.cpp; otherwise as `Matcher`."""

    def __init__(self, vocab: Any, n_vocab: int, text: str) -> None:
        log.errors.clear()
        # NULL for what it cannot parse, left recursion included; an empty text would be taken for "anything".
        self.sampler = L.llama_sampler_init_grammar(vocab, text.encode(), b"root")
        if not self.sampler:
            raise invalid(f"the grammar of response_format is not valid{log.reason()}")
        self.candidates = Candidates(n_vocab)

    def allows(self, token: int) -> bool:
        return self.candidates.apply(np.array([token]), np.zeros(1), self.sampler)[1] == 0.0

    def masked(self, logits: Any) -> Any:
        """Takes 7 ms for 49,152 tokens. Raises `EngineError` where the grammar allows no token."""
        self.candidates.apply(self.candidates.ids, logits, self.sampler)
        masked = self.candidates.buffer["logit"].copy()
        if masked.max() == -np.inf:  # accepting a token all the same would abort the process inside llama.cpp
            raise EngineError("bad_response", "the grammar of response_format allows none of the model's tokens here")
        return masked

    def accept(self, token: int) -> None:
        L.llama_sampler_accept(self.sampler, token)

    def __del__(self) -> None:
        if getattr(self, "sampler", None):
            L.llama_sampler_free(self.sampler)
