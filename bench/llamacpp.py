"""How much of llama.cpp's own speed `engine=llamacpp` keeps: `python -m bench.llamacpp` (JSON on its last line).

Three ways to answer the same questions greedily, in one process, taking turns:
- `sequential`: llama-cpp-python's `create_chat_completion`, one conversation at a time, which is what people run today;
- `bare`: a loop over the low-level batch API that does nothing else: no stops, text, seeds or prefixes, only continuous
  admission (this is the most that the library gives with the same number of sequences);
- `engine`: ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# First: it sets how libgomp waits, before llama_cpp is imported.
from engines.local.gguf_files import requantized, resolve_model  # isort: skip
from engines.local.llamacpp import LlamaCppEngine  # isort: skip

import llama_cpp as L
import numpy as np

from bench.questions import questions
from engines.config import EngineConfig


def bare_loop(engine: LlamaCppEngine, prompts: list[list[int]], tokens: int) -> int:
    """Generates `tokens` for every prompt (fewer where the model ends), in the engine's own context; returns how many."""
    model = engine.model
    n_seq, n_batch, n_vocab, context = model.n_seq, model.n_batch, model.n_vocab, model.context
    batch = L.llama_batch_init(n_batch, 0, 1)
    L.llama_memory_clear(model.memory, False)
    waiting = list(reversed(prompts))
    running: dict[int, list[int]] = {}  # sequence -> [position, last token, tokens left]
    filling: dict[int, tuple[list[int], int]] = {}
    made = 0
    while waiting or running or filling:
        for seq in range(n_seq):
            if waiting and seq not in running and seq not in filling:
                L.llama_memory_seq_rm(model.memory, seq, -1, -1)
                filling[seq] = (waiting.pop(), 0)
        n, room, outputs = 0, n_batch - len(running), []
        for seq in range(n_seq):
            if seq in running:
                chunk, start, last = [running[seq][1]], running[seq][0], True
                running[seq][0] += 1
            elif seq in filling:
                prompt, start = filling[seq]
                chunk = prompt[start : start + room]
                room -= len(chunk)
                last = start + len(chunk) == len(prompt)
                filling[seq] = (prompt, start + len(chunk))
            else:
                continue
            for i, token in enumerate(chunk):
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, start + i, 1
                batch.seq_id[n][0], batch.logits[n] = seq, last and i == len(chunk) - 1
                n += 1
            if last and chunk:
                outputs.append(seq)
        batch.n_tokens = n
        if L.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        if not outputs:
            continue
        picks = np.ctypeslib.as_array(L.llama_get_logits(context), (len(outputs), n_vocab)).argmax(axis=1)
        for seq, pick in zip(outputs, picks.tolist(), strict=True):
            made += 1
            if seq in filling:
                running[seq] = [len(filling.pop(seq)[0]), 0, tokens]
            state = running[seq]
            state[1], state[2] = pick, state[2] - 1
            if pick in model.end_tokens or state[2] == 0:
                del running[seq]
    L.llama_batch_free(batch)
    return made


def run(
    data: Path | None = None,
    rows: int = 64,
    tokens: int = 128,
    repeats: int = 3,
    only: Sequence[str] = ("engine", "bare", "sequential"),
    **kwargs: Any,
) -> dict[str, Any]:
    """Tokens a second of each way (median of the repeats) and the ratios; `kwargs` are the engine's."""
    asked = questions(data, rows)
    kwargs = {"n_ctx": 1024, **kwargs}
    path = resolve_model(EngineConfig("llamacpp"), None)
    if "requantize" in kwargs:
        path = requantized(path, kwargs.pop("requantize"))
    conversations = [{"messages": [{"role": "user", "content": question}]} for question in asked]

    def engine_run() -> int:
        # As new each time: no prefix left over from the run before.
        with LlamaCppEngine(model=str(path), kwargs=kwargs) as engine:
            start[0] = time.perf_counter()
            done = engine.infer(conversations, {"max_tokens": tokens, "temperature": 0})
            took[0] = time.perf_counter() - start[0]
            errors = [c.error for c in done if c.error]
            if errors:
                raise RuntimeError(f"{len(errors)} rows failed: {errors[0]}")
            return sum(c.usage.output for c in done)

    def bare_run() -> int:
        with LlamaCppEngine(model=str(path), kwargs=kwargs) as engine:
            start[0] = time.perf_counter()
            prompts = [
                engine.model.tokenizer.tokenize(engine.template.render(c["messages"], None, None)) for c in conversations
            ]
            made = bare_loop(engine, prompts, tokens)
            took[0] = time.perf_counter() - start[0]
            return made

    def sequential_run() -> int:
        defaults = L.llama_cpp.llama_model_default_params

        def safe() -> Any:  # the AMX crash, see engines/local/llamacpp_model.py
            params = defaults()
            params.use_extra_bufts = b"AMX_INT8 = 1" not in L.llama_print_system_info()
            return params

        L.llama_cpp.llama_model_default_params = safe
        try:
            llama = L.Llama(str(path), n_ctx=1024, n_batch=512, verbose=False)
        finally:
            L.llama_cpp.llama_model_default_params = defaults
        made = 0
        start[0] = time.perf_counter()
        for conversation in conversations:
            answered = llama.create_chat_completion(conversation["messages"], temperature=0.0, max_tokens=tokens)
            made += answered["usage"]["completion_tokens"]
        took[0] = time.perf_counter() - start[0]
        llama.close()
        return made

    start, took = [0.0], [0.0]
    ways: dict[str, Callable[[], int]] = {"engine": engine_run, "bare": bare_run, "sequential": sequential_run}
    ways = {name: way for name, way in ways.items() if name in only}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            # In a thread of its own, as the engine's loop is: libgomp keeps a team of threads for each thread that ever
            # computed, and with more of them than cores it stops spinning (144 tok/s became 103).
            with ThreadPoolExecutor(1) as fresh:
                made = fresh.submit(way).result()
            rates[name].append(made / took[0])
            print(f"{name}: {made} tokens in {took[0]:.1f} s, {made / took[0]:.0f} tok/s", flush=True)
    # Ratios within one repeat, then their median: what else the machine did then touched both alike.
    result: dict[str, Any] = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    for other in rates.keys() - {"engine"} if "engine" in rates else ():
        pairs = zip(rates["engine"], rates[other], strict=True)
        result[f"engine_over_{other}"] = round(statistics.median(a / b for a, b in pairs), 3)
    return {**result, "rows": len(asked), "tokens": tokens, "repeats": repeats, "model": path.name, "kwargs": kwargs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", default="engine,bare,sequential")
    parser.add_argument("--kwargs", type=json.loads, default={}, help='the engine\'s, as JSON: \'{"requantize": "f16"}\'')
    given = parser.parse_args()
    print(json.dumps(run(given.data, given.rows, given.tokens, given.repeats, given.ways.split(","), **given.kwargs)))


if __name__ == "__main__":
    main()
