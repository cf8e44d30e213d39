"""The KV caches of llama.cpp's sequences, and the reuse of prompt prefixes between them."""

from __future__ import annotations

from engines.local.llama_library import L
from engines.local.llamacpp_model import LlamaModel
from engines.local.llamacpp_sequence import Sequence, Slot, Wait

# Copying a prefix moves the whole cache of a sequence in memory. Below this number of tokens, evaluating is cheaper.
MIN_COPIED_TOKENS = 16


def common_prefix(a: list[int], b: list[int]) -> int:
    """The number of equal tokens at the start of both lists."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


class PrefixCache:
    """The slots of a model. It places each new sequence where most of its prompt is already evaluated."""

    def __init__(self, model: LlamaModel) -> None:
        self.memory = model.memory
        self.unified = model.unified
        self.enabled = model.reuses_prefixes
        self.slots = [Slot(i) for i in range(model.n_seq)]

    def place(self, sequence: Sequence, step: int) -> Slot:
        """Gives `sequence` one of the free slots, with the longest prefix of its prompt that any slot has evaluated.

        The prefix is already in the free slot, or it is copied from another slot, now or (`Slot.waits`) once the other
        slot has evaluated it.
        """
        free = [slot for slot in self.slots if slot.running is None]
        slot, kept = self._best_free(free, sequence)
        slot.running, slot.waits, slot.used = sequence, None, step
        donor, count = self._donor(slot, kept, sequence)
        if donor is not None:
            if len(donor.tokens) >= count or donor.running is None:
                self.copy(donor, slot, count)
                return slot
            slot.waits = Wait(donor, donor.running, count)
        sequence.cached = self._cut(slot, kept)
        return slot

    def _best_free(self, free: list[Slot], sequence: Sequence) -> tuple[Slot, int]:
        """The slot that holds most of the prompt, then the one unused for longest; and the number of tokens it holds."""
        if not self.enabled:
            return min(free, key=lambda slot: slot.used), 0
        prompt, limit = sequence.prompt, sequence.reusable
        shared = {slot.id: min(limit, common_prefix(slot.tokens, prompt)) for slot in free}
        best = max(free, key=lambda slot: (shared[slot.id], -slot.used))
        return best, shared[best.id]

    def _donor(self, slot: Slot, kept: int, sequence: Sequence) -> tuple[Slot | None, int]:
        """The slot that has, or will have, the longest prefix of the prompt, and its length. None: no copy is worth it."""
        donor, most = None, kept + MIN_COPIED_TOKENS - 1
        if not self.enabled:
            return donor, most
        prompt, limit = sequence.prompt, sequence.reusable
        for other in self.slots:
            if other is slot:
                continue
            running = other.running
            tokens = running.prompt if running is not None and running.in_prompt else other.tokens
            common = min(limit, common_prefix(tokens, prompt))
            if common > most:
                donor, most = other, common
        return donor, most

    def _cut(self, slot: Slot, kept: int) -> int:
        """Removes all but the first `kept` tokens of a slot. Returns the number that is left: 0 if llama.cpp refuses."""
        if kept < len(slot.tokens):
            if not kept:
                L.llama_memory_seq_rm(self.memory, slot.id, -1, -1)
            elif not L.llama_memory_seq_rm(self.memory, slot.id, kept, -1):
                L.llama_memory_seq_rm(self.memory, slot.id, -1, -1)
                kept = 0
                self.enabled = False
            del slot.tokens[kept:]
        return kept

    def clear(self) -> None:
        """Forgets the tokens of all slots."""
        L.llama_memory_clear(self.memory, True)
        for slot in self.slots:
            slot.tokens = []

    def copy(self, donor: Slot, slot: Slot, count: int) -> None:
        """Replaces the cache of `slot` with the first `count` tokens of the cache of `donor`."""
        assert slot.running is not None
        L.llama_memory_seq_rm(self.memory, slot.id, -1, -1)
        if self.unified:
            L.llama_memory_seq_cp(self.memory, donor.id, slot.id, 0, count)
        else:  # llama.cpp copies separate caches whole; then the rest is removed
            L.llama_memory_seq_cp(self.memory, donor.id, slot.id, -1, -1)
            L.llama_memory_seq_rm(self.memory, slot.id, count, -1)
        slot.tokens = donor.tokens[:count]
        slot.running.cached = count

    def resolve_wait(self, slot: Slot, prompt: list[int]) -> bool:
        """Copies the prefix that `slot` waits for. False if the donor has not evaluated it yet."""
        wait = slot.waits
        if wait is None:
            return True
        if wait.donor.running is wait.owner and len(wait.donor.tokens) < wait.count:
            return False
        slot.waits = None
        count = common_prefix(wait.donor.tokens, prompt[: wait.count])
        if count > len(slot.tokens):
            self.copy(wait.donor, slot, count)
        return True
