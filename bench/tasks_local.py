"""How much of a library's own speed the tasks of the local engines keep: steps of `python -m bench --only tasks_local`.

SmolLM2-135M on the CPU. Both sides of a ratio take turns in one process, on the same texts.
- `embed`: engine=transformers in float32, against sentence-transformers' `encode`, which sorts by length;
- `llamacpp`: task=embed of engine=llamacpp in F16, against a loop over llama.cpp's low-level API, sorted and packed;
- `loglikelihood`: engine=transformers in float32, against the hf backend of lm-evaluation-harness, on questions of GSM8K
  with their answers. $EAGLERAY_LM_EVAL names a folder with the package `lm_eval`, if it is not installed. Without it, the
  other side is its method written again: sorted, longest first, padded, the logits of all positions, `log_softmax`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.questions import questions
from bench.transformers import plain_model
from engines.base import Engine
from engines.registry import load_engine
from tests.support.checkpoint import checkpoint_dir

Timed = tuple[float, list[Any]]  # texts a second, and the values
Way = Callable[[list[Any]], list[Any]]


def _turns(ours: Way, theirs: Way, given: list[Any], repeats: int) -> tuple[dict[str, Any], Any]:
    """Both rates, the median of the ratios of one turn each, and the last values of both."""

    def timed(way: Way) -> Timed:
        began = time.perf_counter()
        found = way(given)
        return len(found) / (time.perf_counter() - began), found

    for way in (ours, theirs):  # warms up
        way(given[:32])
    pairs: list[tuple[Timed, Timed]] = []
    for turn in range(repeats):
        first, second = (timed(ours), timed(theirs)) if turn % 2 else (timed(theirs), timed(ours))[::-1]
        pairs.append((first, second))
    figures = {
        "per_s": round(statistics.median(a[0] for a, _ in pairs), 2),
        "other_per_s": round(statistics.median(b[0] for _, b in pairs), 2),
        "ratio": round(statistics.median(a[0] / b[0] for a, b in pairs), 3),
        "ratios": [round(a[0] / b[0], 3) for a, b in pairs],
    }
    return figures, (pairs[-1][0][1], pairs[-1][1][1])


def _least_cosine(ours: list[Any], theirs: list[Any]) -> float:
    return round(min(float(a @ b / np.linalg.norm(b)) for a, b in zip(ours, theirs, strict=True)), 6)


def embed(data: Path | None, rows: int, repeats: int) -> dict[str, Any]:
    """Against sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    texts = questions(data, rows)
    transformer = Transformer(
        str(checkpoint_dir()), model_kwargs={"dtype": "float32"}, module_output_name="token_embeddings",
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},  # no chat template
    )  # fmt: skip
    transformer.tokenizer.pad_token = transformer.tokenizer.pad_token or transformer.tokenizer.eos_token
    other = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean"), Normalize()])
    kwargs = {"torch_dtype": "float32", "pooling": "mean"}
    with load_engine("transformers", model=str(checkpoint_dir()), max_concurrency=rows, kwargs=kwargs) as engine:
        figures, values = _turns(
            lambda given: _embeddings(engine, given),
            lambda given: list(other.encode(given)),
            texts,
            repeats,
        )
    return {**figures, "least_cosine": _least_cosine(*values), "rows": len(texts)}


def _embeddings(engine: Engine, texts: list[str]) -> list[Any]:
    return [each.values["embedding"] for each in engine.infer([_asked("embed", text=text) for text in texts])]


def _asked(task: str, **inputs: Any) -> dict[str, Any]:
    return {"task": task, "inputs": inputs}


def llamacpp(data: Path | None, rows: int, repeats: int) -> dict[str, Any]:
    """Against a bare loop that packs texts of similar length up to llama.cpp's own size of a batch."""
    texts = questions(data, rows)
    with load_engine("llamacpp", max_concurrency=rows, kwargs={"pooling": "mean", "n_ctx": 512, "n_seq_max": 1}) as engine:
        bare = _BareLoop(engine.model)  # type: ignore[attr-defined]
        figures, values = _turns(
            lambda given: _embeddings(engine, given),
            bare.embed,
            texts,
            repeats,
        )
        bare.close()
    return {**figures, "least_cosine": _least_cosine(*values), "rows": len(texts)}


class _BareLoop:
    """Mean embeddings by llama.cpp's own pooling, in a context of its own."""

    def __init__(self, model: Any, size: int = 512) -> None:
        from engines.local.llama_library import L
        from engines.local.llamacpp_batch import TokenBatch

        self.library, self.model, self.size = L, model, size
        params = model.context_params({})
        params.embeddings, params.pooling_type, params.kv_unified = True, L.LLAMA_POOLING_TYPE_MEAN, True
        params.n_ctx = params.n_batch = params.n_ubatch = size
        params.n_seq_max = 64
        self.context = L.llama_init_from_model(model.handle, params)
        self.batch = TokenBatch(size)

    def embed(self, texts: list[str]) -> list[Any]:
        tokens = [self.model.tokenizer.encode(text) for text in texts]
        found: dict[int, Any] = {}
        pack: list[int] = []
        for at in [*sorted(range(len(tokens)), key=lambda at: len(tokens[at])), None]:
            if pack and (at is None or sum(len(tokens[i]) for i in pack) + len(tokens[at]) > self.size or len(pack) == 64):
                self._decode([tokens[i] for i in pack])
                for seq, i in enumerate(pack):
                    pointer = self.library.llama_get_embeddings_seq(self.context, seq)
                    width = self.library.llama_model_n_embd(self.model.handle)
                    found[i] = np.ctypeslib.as_array(pointer, (width,)).copy()
                pack = []
            if at is not None:
                pack.append(at)
        return [found[at] for at in range(len(tokens))]

    def _decode(self, pack: list[list[int]]) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), False)
        self.batch.n = 0
        for seq, tokens in enumerate(pack):
            self.batch.add(tokens, 0, seq, True)
        self.batch.logits[: self.batch.n] = 1
        assert self.library.llama_decode(self.context, self.batch.struct) == 0

    def close(self) -> None:
        self.library.llama_free(self.context)


def loglikelihood(data: Path | None, rows: int, repeats: int, batch: int = 16) -> dict[str, Any]:
    """Against lm-evaluation-harness."""
    pairs, model = _pairs(data, rows), plain_model("float32")
    kwargs = {"torch_dtype": "float32"}
    with load_engine("transformers", model=str(checkpoint_dir()), max_concurrency=rows, kwargs=kwargs) as engine:
        tokenizer = engine.loaded.tokenizer  # type: ignore[attr-defined]
        other = _lm_eval(model, tokenizer, batch)
        way = "lm_eval" if other else "its method written again"
        other = other or (lambda given: _likelihoods(model, tokenizer, given, batch))

        def ours(given: list[Any]) -> list[Any]:
            asked = [_asked("loglikelihood", prompt=prompt, completion=completion) for prompt, completion in given]
            return [each.values["loglikelihood"] for each in engine.infer(asked)]

        figures, values = _turns(ours, other, pairs, repeats)
    worst = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(*values, strict=True))
    return {**figures, "largest_relative_difference": round(worst, 7), "other": way, "rows": len(pairs), "batch": batch}


def _pairs(data: Path | None, rows: int) -> list[tuple[str, str]]:
    if data is None:
        return [(f"Question: {text}\nAnswer:", f" {text} It is a question.") for text in questions(None, rows)]
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:rows]]
    return [(f"Question: {line['question']}\nAnswer:", f" {line['answer']}") for line in lines]


def _lm_eval(model: Any, tokenizer: Any, batch: int) -> Callable[[list[tuple[str, str]]], list[float]] | None:
    if (folder := os.environ.get("EAGLERAY_LM_EVAL")) and folder not in sys.path:
        sys.path.append(folder)  # at the end: its other packages do not replace the installed ones
    if importlib.util.find_spec("lm_eval") is None:
        return None
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, device="cpu")

    def run(pairs: list[tuple[str, str]]) -> list[float]:
        asked = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)]
        return [found[0] for found in backend.loglikelihood(asked, disable_tqdm=True)]

    return run


def _likelihoods(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], batch: int) -> list[float]:
    encoded = [(tokenizer.encode(prompt), tokenizer.encode(prompt + completion)) for prompt, completion in pairs]
    order = sorted(range(len(encoded)), key=lambda at: -len(encoded[at][1]))
    found = [0.0] * len(encoded)
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        ids = [torch.tensor(encoded[at][1][:-1]) for at in group]
        with torch.inference_mode():
            logits = model(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)).logits.log_softmax(-1)
        for row, at in zip(logits, group, strict=True):
            prompt, whole = encoded[at]
            wanted = torch.tensor(whole[len(prompt) :])
            found[at] = float(row[len(prompt) - 1 : len(whole) - 1].gather(1, wanted[:, None]).sum())
    return found


def run(data: Path | None, step: str = "", rows: int = 256, repeats: int = 3) -> dict[str, Any]:
    steps = {"embed": embed, "llamacpp": llamacpp, "loglikelihood": loglikelihood}
    return {name: way(data, rows, repeats) for name, way in steps.items() if step in ("", name)}


if __name__ == "__main__":
    from bench.__main__ import gsm8k

    given = dict(part.split("=") for part in sys.argv[1:])
    print(json.dumps(run(gsm8k(), given.get("step", ""), int(given.get("rows", 256)), int(given.get("repeats", 3)))))
