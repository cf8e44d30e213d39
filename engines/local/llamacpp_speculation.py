"""Speculative decoding for llama.cpp: the next tokens of an answer are guessed, and the model verifies them in one pass.

Two ways to guess: prompt lookup copies the tokens that followed the last tokens of the text at an earlier place; a draft
model, which is smaller, generates them. If a lookup finds nothing, the draft model guesses.

Each verified token is picked by the answer's own sampler from the model's own logits. A guess is kept only if it equals
the pick. So the distribution of answers, and the draws of a seed, are those without speculation.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from engines.config import EngineConfig
from engines.errors import ConfigError, OutOfMemory
from engines.local.llama_library import L, check_decoded
from engines.local.llamacpp_batch import TokenBatch
from engines.local.llamacpp_model import LlamaModel
from engines.local.llamacpp_prefixes import common_prefix
from engines.local.llamacpp_sequence import Guesses, Slot

# The number of last tokens that a lookup compares. Two tokens are equal by chance too often.
LOOKUP_TOKENS = 3
DEFAULT_GUESSES = 8
# Tokens that are guessed first, and after wrong guesses.
_FIRST_GUESSES = 2
# Tokens of an answer that are decoded without guesses after a guess that was mostly wrong; doubled each time.
_PAUSE, _LONGEST_PAUSE = 4, 64


class Speculation:
    """Guesses tokens for running sequences, and adapts their number to each answer. Used by the scheduler's thread."""

    def __init__(self, model: LlamaModel, kwargs: dict[str, Any]) -> None:
        if not model.reuses_prefixes:
            raise ConfigError(
                "engine.kwargs: prompt_lookup and draft_model do not work with this model: wrong guesses cannot be removed"
                " from its cache",
                key="engine.kwargs",
            )
        self.model = model
        self.most = _power_of_two(kwargs.get("draft_tokens", DEFAULT_GUESSES))
        self.lookup = bool(kwargs.get("prompt_lookup"))
        self.draft = DraftModel(model, kwargs) if kwargs.get("draft_model") else None
        self.guessed = self.accepted = 0  # tokens, since loading

    def guesses(self, slots: list[Slot]) -> dict[int, list[int]]:
        """The guessed tokens of those sequences for which there are some, by the number of the slot."""
        found: dict[int, list[int]] = {}
        undecided: list[tuple[Slot, list[int], int]] = []
        for slot in slots:
            sequence = slot.running
            assert sequence is not None
            if sequence.guesses is None:
                sequence.guesses = Guesses(min(_FIRST_GUESSES, self.most))
            state, text = sequence.guesses, [*slot.tokens, sequence.last]
            # Behind the guesses, the model gives one more token.
            room = min(sequence.limit - sequence.output - 1, self.model.n_ctx - len(text) - 1, self.model.n_batch - 1)
            size = min(state.size, room)
            if size < 1 or sequence.output < state.resumes:
                continue
            tokens = _looked_up(state, text, size) if self.lookup else []
            if tokens:
                found[slot.id] = tokens[: _power_of_two(len(tokens))]
            elif self.draft is not None:
                undecided.append((slot, text, _power_of_two(size)))
        if self.draft is not None and undecided:
            found.update(self._drafted(self.draft, undecided))
        return found

    def _drafted(self, draft: DraftModel, wanted: list[tuple[Slot, list[int], int]]) -> dict[int, list[int]]:
        """The guesses of the draft model. One that fails is used no more: the answers do not need it."""
        try:
            return draft.guesses(wanted)
        except (OutOfMemory, RuntimeError) as error:
            warnings.warn(f"engine.kwargs.draft_model failed, and is used no more: {error}", stacklevel=2)
            self.draft = None
            draft.model.free()
            return {}

    def verified(self, state: Guesses, output: int, guessed: int, accepted: int) -> None:
        """Adapts the number of the next guesses. `output`: the tokens of the answer so far."""
        self.guessed += guessed
        self.accepted += accepted
        if accepted == guessed:
            state.size, state.failures = min(2 * state.size, self.most), 0
            return
        state.size = min(max(_FIRST_GUESSES, _power_of_two(accepted)), self.most)
        if 2 * accepted < guessed:
            state.resumes = output + min(_PAUSE << state.failures, _LONGEST_PAUSE)
            state.failures += 1

    def close(self) -> None:
        if self.draft is not None:
            self.draft.model.free()


def _power_of_two(number: int) -> int:
    """The largest power of two up to `number`. The scheduler verifies equally many guesses together."""
    return 1 << number.bit_length() >> 1


def _looked_up(state: Guesses, text: list[int], size: int) -> list[int]:
    """The tokens that followed the last occurrence of the last tokens of the text; none if there is no other one."""
    n = LOOKUP_TOKENS
    for end in range(max(n, state.indexed), len(text)):
        state.followers[tuple(text[end - n : end])] = end
    state.indexed = max(n, len(text))
    at = state.followers.get(tuple(text[-n:]))
    return [] if at is None else text[at : at + size]


class DraftModel:
    """A smaller model with the same vocabulary. It holds the texts of the slots in a cache of its own."""

    def __init__(self, model: LlamaModel, kwargs: dict[str, Any]) -> None:
        name = kwargs["draft_model"]
        own = {key: value for key, value in kwargs.items() if key in _SHARED_KWARGS}
        own |= {"n_ctx": model.n_ctx, "n_seq_max": model.n_seq}
        try:
            self.model = draft = LlamaModel(EngineConfig("llamacpp", model=name, kwargs=own), own)
        except ConfigError as error:
            raise ConfigError(f"engine.kwargs.draft_model: {error}", key="engine.kwargs") from None
        if not draft.context or not draft.reuses_prefixes or _vocabulary(draft) != _vocabulary(model):
            draft.free()
            raise ConfigError(
                f"engine.kwargs.draft_model: {name} is not a language model with the tokens of engine.model",
                key="engine.kwargs",
            )
        self.batch = TokenBatch(draft.n_batch)
        self.cached: list[list[int]] = [[] for _ in range(draft.n_seq)]  # the tokens in the cache, by slot

    def guesses(self, wanted: list[tuple[Slot, list[int], int]]) -> dict[int, list[int]]:
        """The most probable next tokens. `wanted`: slot, text, number of tokens."""
        found: dict[int, list[int]] = {slot.id: [] for slot, _, _ in wanted}
        self._read([(slot.id, text) for slot, text, _ in wanted])
        for step in range(max(size for _, _, size in wanted)):
            active = [(slot.id, text, size) for slot, text, size in wanted if step < size]
            self.batch.n = 0
            for seq, text, _ in active:
                self._add(seq, [found[seq][-1] if found[seq] else text[-1]], True)
            rows = self._decode(len(active))
            for (seq, _, _), token in zip(active, rows.argmax(axis=1).tolist(), strict=True):
                found[seq].append(token)
        return found

    def _read(self, texts: list[tuple[int, list[int]]]) -> None:
        """Brings the cache to all but the last token of each text."""
        for seq, text in texts:
            kept = common_prefix(self.cached[seq], text[:-1])
            if kept < len(self.cached[seq]):
                L.llama_memory_seq_rm(self.model.memory, seq, kept, -1)
                del self.cached[seq][kept:]
            for at in range(kept, len(text) - 1, self.model.n_batch):
                self.batch.n = 0
                self._add(seq, text[at : min(at + self.model.n_batch, len(text) - 1)], False)
                self._decode(0)

    def _add(self, seq: int, tokens: list[int], output: bool) -> None:
        self.batch.add(tokens, len(self.cached[seq]), seq, output)
        self.cached[seq] += tokens

    def _decode(self, outputs: int) -> Any:
        """The logits of the tokens that have some: an array of shape (outputs, vocabulary)."""
        check_decoded(L.llama_decode(self.model.context, self.batch.struct))
        shape = (outputs, self.model.n_vocab)
        return np.ctypeslib.as_array(L.llama_get_logits(self.model.context), shape) if outputs else None


# The keywords of the engine that a draft model takes over.
_SHARED_KWARGS = {"n_batch", "n_ubatch", "n_threads", "n_threads_batch", "n_gpu_layers", "kv_unified", "verbose"}


def _vocabulary(model: LlamaModel) -> list[bytes]:
    """The texts of tokens from all parts of the vocabulary, and how many there are."""
    places = range(0, model.n_vocab, max(1, model.n_vocab // 500))
    return [str(model.n_vocab).encode(), *(model.tokenizer.piece(token, special=True) for token in places)]
