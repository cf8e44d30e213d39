"""How much of transformers' own speed `engine=transformers` keeps: `python -m bench --only transformers`.

SmolLM2-135M as a checkpoint (made by tests/support/checkpoint.py), bfloat16, the same model object for both sides, which
take turns. The other side is what one would write by hand: all prompts sorted by length and cut into batches, each padded
and given to `model.generate`.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.llamacpp import questions
from engines.registry import load_engine
from tests.support.checkpoint import checkpoint_dir


def generate_loop(model: Any, tokenizer: Any, asked: list[str], tokens: int, batch: int) -> int:
    """Answers all questions; returns the number of tokens made, without what only pads."""
    prompts = sorted((_prompt(tokenizer, question) for question in asked), key=len)
    ends, made = tokenizer.eos_token_id, 0
    for at in range(0, len(prompts), batch):
        given = tokenizer.pad({"input_ids": prompts[at : at + batch]}, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            found = model.generate(**given, max_new_tokens=tokens, do_sample=False, pad_token_id=ends)
        for row in found[:, given["input_ids"].shape[1] :].tolist():
            made += row.index(ends) if ends in row else len(row)
    return made


def _prompt(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    found: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return found


def run(data: Path | None, rows: int, tokens: int, repeats: int, batch: int = 64) -> dict[str, Any]:
    """Tokens a second of both, and the median of the ratios."""
    asked = questions(data, rows)
    conversations = [{"messages": [{"role": "user", "content": question}]} for question in asked]
    kwargs = {"max_batch_size": batch}
    with load_engine("transformers", model=str(checkpoint_dir()), max_concurrency=rows, kwargs=kwargs) as engine:

        def ours() -> float:
            began = time.perf_counter()
            found = engine.infer(conversations, {"max_tokens": tokens})
            return sum(completion.usage.output for completion in found) / (time.perf_counter() - began)

        def bare() -> float:
            began = time.perf_counter()
            made = generate_loop(engine.loaded.model, engine.loaded.tokenizer, asked, tokens, batch)  # type: ignore[attr-defined]
            return made / (time.perf_counter() - began)

        engine.infer(conversations[:batch], {"max_tokens": 8})
        generate_loop(engine.loaded.model, engine.loaded.tokenizer, asked[:batch], 8, batch)  # type: ignore[attr-defined]
        pairs = [(bare(), ours()) if turn % 2 else tuple(reversed((ours(), bare()))) for turn in range(repeats)]
    return {
        "tokens_per_s": round(statistics.median(b for _, b in pairs), 1),
        "bare": round(statistics.median(a for a, _ in pairs), 1),
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
        "ratios": [round(b / a, 3) for a, b in pairs],
        "rows": rows, "tokens": tokens, "batch": batch,
    }  # fmt: skip
