"""Sampling for llama.cpp: the sampler chain of one answer, and picking tokens under a grammar."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from engines.errors import EngineError, invalid
from engines.local.grammar import Grammars, Matcher, text_under
from engines.local.llama_library import L, log
from engines.params import GenerationParams


class Sampler:
    """Picks the tokens of one answer. After submission, only the scheduler's thread uses it.

    The chain is logit_bias, repetition penalty, frequency and presence penalties, top_k, top_p, min_p, temperature, draw.
    The constructor raises `EngineError("invalid_input")` for a token id or a grammar that is not valid.
    """

    def __init__(
        self,
        vocab: Any,
        grammars: Grammars,
        n_vocab: int,
        params: GenerationParams,
        prompt: list[int],
        seed: int,
        limit: int,
    ) -> None:
        temperature = params.temperature or 0.0
        repetition = params.repetition_penalty or 1.0
        frequency, presence = params.frequency_penalty or 0.0, params.presence_penalty or 0.0
        # The token with the highest logit is the pick; the chain is not needed.
        self.greedy = temperature == 0.0 and not (params.logit_bias or repetition != 1.0 or frequency or presence)
        self.grammar: Matcher | GBNFSampler | None = None
        self.chain = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())

        def add(stage: Any) -> None:
            L.llama_sampler_chain_add(self.chain, stage)  # the chain owns the stage now

        if params.response_format is not None:
            if params.response_format["type"] == "grammar":
                self.grammar = GBNFSampler(vocab, n_vocab, text_under(params.response_format, "grammar", "gbnf"))
            else:
                self.grammar = grammars.matcher(params.response_format)
        if params.logit_bias:
            add(_logit_bias(params.logit_bias, n_vocab))
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
            if params.top_k is not None and params.top_k > 0:
                add(L.llama_sampler_init_top_k(params.top_k))
            if params.top_p is not None and params.top_p < 1.0:
                add(L.llama_sampler_init_top_p(params.top_p, 1))
            if params.min_p:
                add(L.llama_sampler_init_min_p(params.min_p, 1))
            add(L.llama_sampler_init_temp(temperature))
            # The modulus excludes 2**32 - 1, which makes llama.cpp choose a random seed.
            add(L.llama_sampler_init_dist(seed % 0xFFFFFFFF))

    def free(self) -> None:
        if self.chain:
            L.llama_sampler_free(self.chain)
        self.chain = self.grammar = None

    __del__ = free


def _logit_bias(logit_bias: dict[str, float], n_vocab: int) -> Any:
    biases = (L.llama_logit_bias * len(logit_bias))()
    for i, (name, bias) in enumerate(logit_bias.items()):
        if not 0 <= int(name) < n_vocab:
            raise invalid(f"logit_bias names token {name}; the model has {n_vocab}")
        biases[i] = L.llama_logit_bias(int(name), bias)
    return L.llama_sampler_init_logit_bias(n_vocab, len(biases), biases)


class Candidates:
    """llama.cpp's array of (id, logit, probability), in one buffer of `n_vocab` entries that each use fills again."""

    def __init__(self, n_vocab: int) -> None:
        self.ids = np.arange(n_vocab, dtype=np.int32)
        self.buffer = np.zeros(n_vocab, dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self.pointer = self.buffer.ctypes.data_as(L.llama_token_data_p)

    def apply(self, ids: Any, logits: Any, *samplers: Any) -> tuple[int, float]:
        """The token that the samplers select, and its logit; -inf if they allow no token.

        If no sampler selects (a grammar only masks), this is the token with the highest logit.
        """
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
        """Picks a token of a sampler with a grammar, from the logits `row` (shape `(n_vocab,)`).

        The grammar checks the pick before it masks all tokens: masking is slow, and most picks are allowed. This is
        also exact for a draw: p(x) + p(refused) · p(x) / p(allowed) = p(x) / p(allowed).
        Raises `EngineError("bad_response")` if the grammar allows no token.
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
        return int(row.argmax()) if sampler.greedy else self.apply(self.ids, row, sampler.chain)[0]


class GBNFSampler:
    """A grammar in GBNF, which llama.cpp enforces. It has the methods of `Matcher`.

    The constructor raises `EngineError("invalid_input")` for a grammar that is not valid.
    """

    def __init__(self, vocab: Any, n_vocab: int, text: str) -> None:
        log.errors.clear()
        # NULL for a grammar that llama.cpp cannot parse, also for left recursion. An empty text would allow everything.
        self.sampler = L.llama_sampler_init_grammar(vocab, text.encode(), b"root")
        if not self.sampler:
            raise invalid(f"the grammar of response_format is not valid{log.reason()}")
        self.candidates = Candidates(n_vocab)

    def allows(self, token: int) -> bool:
        return self.candidates.apply(np.array([token]), np.zeros(1), self.sampler)[1] == 0.0

    def masked(self, logits: Any) -> Any:
        """Takes 7 ms for 49,152 tokens. Raises `EngineError("bad_response")` if the grammar allows no token."""
        self.candidates.apply(self.candidates.ids, logits, self.sampler)
        masked = self.candidates.buffer["logit"].copy()
        if masked.max() == -np.inf:  # llama.cpp aborts the process if a refused token is accepted
            raise EngineError("bad_response", "the grammar of response_format allows none of the model's tokens here")
        return masked

    def accept(self, token: int) -> None:
        L.llama_sampler_accept(self.sampler, token)

    def __del__(self) -> None:
        if getattr(self, "sampler", None):
            L.llama_sampler_free(self.sampler)
