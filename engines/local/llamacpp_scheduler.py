"""Continuous batching for llama.cpp: one thread that owns the model's context.

A step of its loop places waiting sequences in free slots, decodes the next token of all running sequences in one batch,
evaluates prompts of new sequences (about `n_batch` tokens), samples, and finishes what is complete.

Each prompt is evaluated alone, and no token is decoded alone: llama.cpp rounds differently for one token than for several,
so an answer would depend on the other requests.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
from collections import deque
from typing import Any

import numpy as np

from engines.errors import EngineError, OutOfMemory
from engines.local.llama_library import L, check_decoded
from engines.local.llamacpp_batch import TokenBatch
from engines.local.llamacpp_model import LlamaModel
from engines.local.llamacpp_prefixes import PrefixCache
from engines.local.llamacpp_sampling import Candidates
from engines.local.llamacpp_sequence import Sequence, Slot
from engines.local.llamacpp_speculation import Speculation


class Scheduler:
    """Generates the submitted sequences. It owns the model: `close` frees it."""

    def __init__(self, model: LlamaModel, speculation: Speculation | None = None) -> None:
        self.model, self.speculation = model, speculation
        self.context, self.memory = model.context, model.memory
        self.n_vocab, self.end_tokens = model.n_vocab, model.end_tokens
        self.tokenizer = model.tokenizer
        self.n_batch = model.n_batch
        self.batch = TokenBatch(model.n_batch)
        self.candidates = Candidates(model.n_vocab)
        self.cache = PrefixCache(model)
        self.slots = self.cache.slots
        self.filling: list[Slot] = []  # slots whose prompt is not evaluated to its end, in order of admission
        self.step = 0
        self.closed = False
        self.failure: BaseException | None = None  # the exception that ended the loop
        self.inbox: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()  # None wakes the thread
        self.thread = threading.Thread(target=self._loop, name="llamacpp", daemon=True)
        self.thread.start()
        # llama.cpp must not compute while the process destroys its static objects, also if nobody called `close`.
        atexit.register(self.close)

    # --- Any thread

    def submit(self, sequences: list[Sequence]) -> None:
        """Queues sequences; their futures get the answers. Raises `EngineError` if the scheduler has ended."""
        for sequence in sequences:
            self.inbox.put(sequence)
        self.check_open()  # after the put: a loop that ended before it never sees these sequences

    def check_open(self) -> None:
        """Raises `EngineError`: "engine_crash" if the loop failed, "cancelled" if the scheduler is closed."""
        if self.failure is not None:
            raise EngineError("engine_crash", f"llama.cpp stopped: {self.failure}")
        if self.closed:
            raise EngineError("cancelled", "the engine is closed")

    def close(self) -> None:
        """Stops the thread and frees the model. Sequences that run or wait fail with "cancelled". Can be called twice."""
        if self.closed:
            return
        self.closed = True
        self.inbox.put(None)
        self.thread.join()
        if self.speculation is not None:
            self.speculation.close()
        self.model.free()
        atexit.unregister(self.close)

    # --- The scheduler's thread

    def _loop(self) -> None:
        waiting: deque[Sequence] = deque()
        try:
            while not self.closed:
                self._receive(waiting)
                if not self.closed:
                    try:
                        self._step(waiting)
                    except OutOfMemory as error:
                        _drop_running(self, str(error))
        except BaseException as error:  # any error: no caller may wait for ever
            self.failure = error
            reason = EngineError("engine_crash", str(error)) if isinstance(error, RuntimeError) else error
            for sequence in self._unfinished(waiting):
                sequence.fail(reason)
        for sequence in self._unfinished(waiting):
            sequence.fail(EngineError("cancelled", "the engine was closed"))

    def _unfinished(self, waiting: deque[Sequence]) -> list[Sequence]:
        left = [slot.running for slot in self.slots if slot.running is not None] + list(waiting)
        with contextlib.suppress(queue.Empty):
            while True:
                sequence = self.inbox.get_nowait()
                if sequence is not None:
                    left.append(sequence)
        return left

    def _receive(self, waiting: deque[Sequence]) -> None:
        """Moves submitted sequences to `waiting`. Blocks if there is nothing to do."""
        idle = not waiting and all(slot.running is None for slot in self.slots)
        with contextlib.suppress(queue.Empty):
            while True:
                sequence = self.inbox.get(block=idle)
                idle = False
                if sequence is not None:
                    waiting.append(sequence)

    def _step(self, waiting: deque[Sequence]) -> None:
        self.step += 1
        for slot in self.slots:
            if slot.running is not None and slot.running.future.cancelled():
                self._release(slot)
        while waiting and any(slot.running is None for slot in self.slots):
            sequence = waiting.popleft()
            if not sequence.future.cancelled():
                sequence.started = time.perf_counter()
                self.filling.append(self.cache.place(sequence, self.step))
        verified = self._decode_guesses() if self.speculation is not None else set()
        self._decode_next(verified)
        self._decode_prompts()

    def _decode_guesses(self) -> set[int]:
        """Verifies the guessed tokens of sequences that have some. Returns the numbers of their slots.

        Sequences with equally many guesses are verified together: llama.cpp rounds their rows as if each were alone, so an
        answer does not depend on the guesses for others.
        """
        assert self.speculation is not None
        running = [slot for slot in self.slots if slot.running is not None and not slot.running.in_prompt]
        found = self.speculation.guesses(running) if running else {}
        for size in sorted(set(map(len, found.values()))):
            group = [slot for slot in running if len(found.get(slot.id, ())) == size]
            most = max(1, self.model.n_ubatch // (size + 1))
            for start in range(0, len(group), most):
                self._verify(group[start : start + most], found)
        return set(found)

    def _verify(self, slots: list[Slot], found: dict[int, list[int]]) -> None:
        assert self.speculation is not None
        batch = self.batch
        batch.n = 0
        for slot in slots:
            assert slot.running is not None
            tokens = [slot.running.last, *found[slot.id]]
            batch.add(tokens, len(slot.tokens), slot.id, True)
            slot.tokens += tokens
        batch.logits[: batch.n] = 1
        self._decode()
        rows = np.ctypeslib.as_array(L.llama_get_logits(self.context), (batch.n, self.n_vocab))
        first = 0  # the first row of the slot
        for slot in slots:
            sequence, guesses = slot.running, found[slot.id]
            assert sequence is not None and sequence.guesses is not None
            accepted = 0
            for index, guess in enumerate([*guesses, None], first):
                self._sample_one(slot, sequence, index, rows[index])
                if slot.running is not sequence or sequence.last != guess:
                    break
                accepted += 1
            self.speculation.verified(sequence.guesses, sequence.output, len(guesses), accepted)
            wrong = len(guesses) - accepted
            if wrong:
                del slot.tokens[-wrong:]
                L.llama_memory_seq_rm(self.memory, slot.id, len(slot.tokens), -1)
            first += len(guesses) + 1

    def _decode_next(self, verified: set[int]) -> None:
        """Decodes one token of every sequence whose prompt is evaluated, except for the `verified` slots.

        The batch is in the order of the slots, because llama.cpp computes only neighbours of separate caches together.
        A sequence without a neighbour in the batch gets a padding row beside it, which is removed from its cache
        afterwards: llama.cpp rounds a batch of one differently.
        """
        batch = self.batch
        batch.n = 0
        running = [slot.running is not None and slot.running.last >= 0 and slot.id not in verified for slot in self.slots]
        outputs: list[tuple[int, Slot]] = []
        padding: list[Slot] = []
        for i, slot in enumerate(self.slots):
            sequence = slot.running
            if sequence is not None and running[i]:
                outputs.append((batch.n, slot))
                batch.add([sequence.last], len(slot.tokens), slot.id, True)
                slot.tokens.append(sequence.last)
            elif self.cache.enabled and _is_padding(i, running) and len(slot.tokens) < self.model.n_ctx:
                padding.append(slot)
                batch.add([self.model.padding_token], len(slot.tokens), slot.id, True)
        if outputs:
            self._decode()
            for slot in padding:
                L.llama_memory_seq_rm(self.memory, slot.id, len(slot.tokens), -1)
            self._sample(outputs)

    def _decode_prompts(self) -> None:
        """Evaluates prompts in the order of admission, about `n_batch` tokens per step.

        Each prompt is evaluated alone and cut at the same places, so that its answer does not depend on other requests.
        This costs no speed: llama.cpp does not compute prompts of unequal length together either.
        """
        budget = self.n_batch
        for slot in list(self.filling):
            sequence = slot.running
            if sequence is None or budget <= 0:
                break
            if not self.cache.resolve_wait(slot, sequence.prompt):
                continue  # the donor's prompt needs more steps
            while budget > 0 and slot.running is sequence and sequence.in_prompt:
                budget -= self._decode_chunk(slot, sequence)

    def _decode_chunk(self, slot: Slot, sequence: Sequence) -> int:
        """Evaluates the next part of a prompt. Returns its size.

        At the end of the prompt, samples the first token after it, or finishes a text that is scored.
        """
        done = len(slot.tokens)
        left = len(sequence.prompt) - done
        size = self.n_batch - 1 if left == self.n_batch + 1 else min(left, self.n_batch)  # no part of one token
        chunk = sequence.prompt[done : done + size]
        self.batch.n = 0
        self.batch.add(chunk, done, slot.id, size == left)
        if sequence.scored:
            self.batch.logits[:size] = np.arange(done, done + size) >= sequence.score_from - 1
        self._decode()
        slot.tokens.extend(chunk)
        if sequence.scored:
            self._score(sequence, done, size)
            if size == left:
                self._release(slot)
                sequence.finish()
        elif size == left:
            self.filling.remove(slot)
            self._sample([(size - 1, slot)])
        return size

    def _score(self, sequence: Sequence, done: int, size: int) -> None:
        """Adds the log probabilities of the tokens that the decoded part, from position `done`, predicts."""
        first = max(done, sequence.score_from - 1)
        count = done + size - first
        if count <= 0:
            return
        rows = np.ctypeslib.as_array(L.llama_get_logits(self.context), (count, self.n_vocab))
        for row, token in zip(rows, sequence.scored[first + 1 :], strict=False):
            top = float(row.max())
            sequence.scores.append(float(row[token]) - top - float(np.log(np.exp(row - top).sum(dtype=np.float64))))

    def _decode(self) -> None:
        check_decoded(L.llama_decode(self.context, self.batch.struct))

    def _sample(self, outputs: list[tuple[int, Slot]]) -> None:
        """Picks the next token of each sequence. `outputs`: (index of its token in the batch, slot)."""
        count = int(self.batch.logits[: self.batch.n].sum())
        rows = np.ctypeslib.as_array(L.llama_get_logits(self.context), (count, self.n_vocab))
        for index, slot in outputs:
            assert slot.running is not None
            # Every token of the batch has a row of logits, or only its last.
            self._sample_one(slot, slot.running, index, rows[index] if count > 1 else rows[0])

    def _sample_one(self, slot: Slot, sequence: Sequence, index: int, row: Any) -> None:
        """Picks the next token of a sequence from the logits `row` of the token at `index` in the batch."""
        sampler = sequence.sampler
        assert sampler is not None
        try:
            if sampler.grammar is not None:
                token = self.candidates.pick(sampler, row)
            elif sampler.greedy:
                token = int(row.argmax())
            else:
                token = L.llama_sampler_sample(sampler.chain, self.context, index)
            self._append(slot, sequence, token, row)
        except EngineError as error:
            self._release(slot)
            sequence.fail(error)

    def _append(self, slot: Slot, sequence: Sequence, token: int, row: Any) -> None:
        """Adds a sampled token to a sequence, and finishes the sequence if the token ends it."""
        sequence.last = token
        sequence.output += 1
        is_end_token = token in self.end_tokens or token in sequence.stop_ids
        ended = is_end_token
        if not ended:
            if sequence.logprobs is not None:
                sequence.entries.append(self._logprob(row, token, sequence.logprobs))
            ended = sequence.append(self.tokenizer.piece(token))
        if not ended and sequence.output >= sequence.limit:
            ended, sequence.reason = True, "length"
        if ended:
            if is_end_token or sequence.reason == "length":  # not after a stop text: the text ends before it
                sequence.text += sequence.decoder.decode(b"", final=True)
            self._release(slot)
            sequence.finish()
        elif sequence.stream is not None:
            sequence.send(sequence.stream)

    def _release(self, slot: Slot) -> None:
        """Makes a slot free. Its cache stays, for the prefixes of later prompts."""
        if slot.running is not None and slot.running.sampler is not None:
            slot.running.sampler.free()
        slot.running, slot.waits, slot.used = None, None, self.step
        if slot in self.filling:
            self.filling.remove(slot)

    def _logprob(self, row: Any, token: int, count: int) -> dict[str, Any]:
        """An entry of OpenAI's `logprobs.content`, from the logits `row` (shape `(n_vocab,)`)."""
        top = float(row.max())
        total = top + float(np.log(np.exp(row - top, dtype=np.float64).sum()))
        best: list[int] = []
        if count:
            count = min(count, self.n_vocab)
            best = [int(t) for t in np.argpartition(row, -count)[-count:]]
            best.sort(key=lambda t: (-float(row[t]), t))

        def entry(t: int) -> dict[str, Any]:
            piece = self.tokenizer.piece(t, special=True)
            return {"token": piece.decode("utf-8", "replace"), "logprob": float(row[t]) - total, "bytes": list(piece)}

        return {**entry(token), "top_logprobs": [entry(t) for t in best]}


def _drop_running(scheduler: Scheduler, reason: str) -> None:
    """Fails all sequences in slots, and forgets their caches: llama.cpp may have kept a part of the batch."""
    running = [slot for slot in scheduler.slots if slot.running is not None]
    for slot in running:
        assert slot.running is not None
        slot.running.fail(OutOfMemory(reason, alone=len(running) == 1))
        scheduler._release(slot)
    scheduler.cache.clear()


def _is_padding(i: int, running: list[bool]) -> bool:
    """Slot `i` gets a padding row: the slot before it has no neighbour, or the last slot, after it, has none."""
    padded = [False, False, *running, False, False]
    j = i + 2
    after_lonely = padded[j - 1] and not padded[j - 2]
    before_last = padded[j + 1] and j + 2 == len(running) + 2 and not padded[j + 2]
    return after_lonely or before_last
