"""The speed of `engine=transformers` on a CPU: `python -m bench --only transformers` (or transformers.loop, …choice).

SmolLM2-135M as a checkpoint (made by tests/support/checkpoint.py), bfloat16. Both sides of a ratio take turns.
- `loop`: 256 questions, against a loop written by hand: all prompts sorted by length and cut into batches, each padded
  and given to `model.generate`, with the attention and the KV cache of transformers;
- `choice`: against engine=vllm on the CPU: the same rows at once; rows with one long system prompt; and one row at a time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bench.questions import questions
from engines.base import Engine
from engines.registry import load_engine
from tests.support.checkpoint import checkpoint_dir

BATCH = 64
SYSTEM = "You answer questions of arithmetic. " + "Be brief, be exact, and write each step on a line of its own. " * 30


def plain_model(dtype: str = "auto", model: Path | None = None) -> Any:
    """The checkpoint with the attention of transformers, which the engine replaces in its process."""
    transformers.AttentionInterface.register("plain", sdpa_attention_forward)
    transformers.AttentionMaskInterface.register("plain", sdpa_mask)
    source, place = model or checkpoint_dir(), "auto" if torch.cuda.is_available() else "cpu"
    kwargs = {"dtype": dtype, "device_map": place, "attn_implementation": "plain"}
    return transformers.AutoModelForCausalLM.from_pretrained(source, **kwargs)


def generate_loop(model: Any, tokenizer: Any, asked: list[str], tokens: int, batch: int) -> int:
    """Answers all questions; returns the number of tokens made, without what only pads."""
    prompts = sorted((_prompt(tokenizer, question) for question in asked), key=len)
    ends, made = tokenizer.eos_token_id, 0
    for at in range(0, len(prompts), batch):
        given = tokenizer.pad({"input_ids": prompts[at : at + batch]}, padding_side="left", return_tensors="pt")
        given = given.to(model.device)
        with torch.inference_mode():
            found = model.generate(**given, max_new_tokens=tokens, do_sample=False, pad_token_id=ends)
        for row in found[:, given["input_ids"].shape[1] :].tolist():
            made += row.index(ends) if ends in row else len(row)
    return made


def _prompt(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    found: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return found


def _rows(asked: list[str], system: str = "") -> list[dict[str, Any]]:
    before = [{"role": "system", "content": system}] if system else []
    return [{"messages": [*before, {"role": "user", "content": question}]} for question in asked]


def _load(rows: int, batch: int = BATCH, model: Path | None = None) -> Engine:
    kwargs = {"max_batch_size": batch}
    return load_engine("transformers", model=str(model or checkpoint_dir()), max_concurrency=rows, kwargs=kwargs)


def _turns(ours: Callable[[], int], other: Callable[[], int], repeats: int) -> dict[str, Any]:
    """Tokens a second of both, and the median of the ratios of one turn each."""

    def rate(way: Callable[[], int]) -> float:
        began = time.perf_counter()
        made = way()
        return made / (time.perf_counter() - began)

    pairs = []
    for turn in range(repeats):
        first, second = (other, ours) if turn % 2 else (ours, other)
        rates = {first: rate(first), second: rate(second)}
        pairs.append((rates[ours], rates[other]))
    return {
        "tokens_per_s": round(statistics.median(a for a, _ in pairs), 1),
        "bare": round(statistics.median(b for _, b in pairs), 1),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "ratios": [round(a / b, 3) for a, b in pairs],
    }


def _made(engine: Engine, rows: list[dict[str, Any]], tokens: int) -> int:
    found = engine.infer(rows, {"max_tokens": tokens})
    assert not any(each.error for each in found)
    return sum(each.usage.output for each in found)


def run(
    data: Path | None, rows: int, tokens: int, repeats: int, batch: int = BATCH, model: Path | None = None
) -> dict[str, Any]:
    """Against the loop by hand."""
    asked = questions(data, rows)
    plain = plain_model(model=model)
    with _load(rows, batch, model) as engine:
        tokenizer = engine.loaded.tokenizer  # type: ignore[attr-defined]
        _made(engine, _rows(asked[:batch]), 8)
        generate_loop(plain, tokenizer, asked[:batch], 8, batch)
        figures = _turns(
            lambda: _made(engine, _rows(asked), tokens),
            lambda: generate_loop(plain, tokenizer, asked, tokens, batch),
            repeats,
        )
    return {**figures, "rows": rows, "tokens": tokens, "batch": batch}


def choice(data: Path | None, rows: int = 128, tokens: int = 64, repeats: int = 2) -> dict[str, Any]:
    """Against engine=vllm, with as many rows together."""
    from bench.vllm import KWARGS

    asked = questions(data, rows)
    kwargs = {**KWARGS, "enable_prefix_caching": True}
    with (
        _load(rows) as engine,
        load_engine("vllm", model=str(checkpoint_dir()), max_concurrency=rows, kwargs=kwargs) as other,
    ):
        ways: dict[str, tuple[list[list[dict[str, Any]]], int]] = {
            "many": ([_rows(asked)], tokens),
            "prefix": ([_rows(asked[:BATCH], SYSTEM)], tokens // 2),
            "one": ([[row] for row in _rows(asked[:4])], tokens),
        }
        found: dict[str, Any] = {"rows": rows, "tokens": tokens, "batch": BATCH}
        for each in (engine, other):
            _made(each, _rows(asked[:BATCH]), 8)
        for name, (calls, most) in ways.items():
            found[name] = _turns(
                lambda calls=calls, most=most: sum(_made(engine, call, most) for call in calls),  # type: ignore[misc]
                lambda calls=calls, most=most: sum(_made(other, call, most) for call in calls),  # type: ignore[misc]
                repeats,
            )
    return found
