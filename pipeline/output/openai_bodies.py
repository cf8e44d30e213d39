"""The values of tasks other than a chat as response bodies in the form of OpenAI and of vLLM, and back."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Values = Mapping[str, Any]


def values_body(
    task: str, number: int, values: Values, inputs: Values, model: str | None, usage: Mapping[str, Any] | None,
    url: str = "", encoding: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The body of one row. `number` is a part of its id. `inputs` are those of the request (its documents, for example).

    A `rerank` that was asked at `url` /v1/score has the form of scores. `encoding`: base64 for embeddings.
    """
    end = url.partition("?")[0].rstrip("/").rpartition("/")[2]
    kind, prefix, key, items = _AT_URLS.get((task, end), _BODIES[task])
    tokens = usage["input"] if usage else None
    return {
        "id": f"{prefix}-{number}",
        "object": kind,
        "model": model,
        key: items(values, inputs, encoding),
        "usage": tokens if tokens is None else {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
    }


def _embeddings(values: Values, inputs: Values, encoding: str | None) -> list[Any]:
    found: Any = values["embedding"]
    if encoding == "base64":
        found = base64.b64encode(np.asarray(found, "<f4").tobytes()).decode()
    return [{"object": "embedding", "index": 0, "embedding": found}]


def _labels(values: Values, inputs: Values, encoding: str | None) -> list[Any]:
    scores = values["scores"] or []
    return [{"index": 0, "label": values["label"], "scores": scores, "num_classes": len(scores)}]


def _score(values: Values, inputs: Values, encoding: str | None) -> list[Any]:
    return [{"index": 0, "object": "score", "score": values["score"]}]


def _scores(values: Values, inputs: Values, encoding: str | None) -> list[Any]:
    found = sorted(values["ranking"], key=lambda each: each["index"])
    return [{"index": each["index"], "object": "score", "score": each["score"]} for each in found]


def _results(values: Values, inputs: Values, encoding: str | None) -> list[Any]:
    documents, top = inputs.get("documents") or (), inputs.get("top_n")
    found = [{"index": each["index"], "relevance_score": each["score"]} for each in values["ranking"]]
    for each in found if documents and isinstance(documents, list) else ():
        text = documents[each["index"]]
        each["document"] = {"text": text} if isinstance(text, str) else text
    return found[:top] if isinstance(top, int) and top > 0 else found


def _completion(values: Values, inputs: Values, encoding: str | None) -> list[Any]:
    likely = {name: values[name] for name in ("loglikelihood", "tokens", "perplexity")}
    each = values.get("token_logprobs")
    logprobs = {"token_logprobs": each} if each is not None else None
    return [{"index": 0, "text": inputs.get("completion"), "finish_reason": "length", "logprobs": logprobs, **likely}]


# Task -> the kind of its body, the beginning of its id, the key of its items, and the items.
_BODIES: dict[str, tuple[str, str, str, Callable[[Values, Values, str | None], list[Any]]]] = {
    "embed": ("list", "embd", "data", _embeddings),
    "classify": ("list", "classify", "data", _labels),
    "score": ("list", "score", "data", _score),
    "rerank": ("list", "rerank", "results", _results),
    "loglikelihood": ("text_completion", "cmpl", "choices", _completion),
}
# The same for a task that was asked at the URL of another one.
_AT_URLS = {("rerank", "score"): ("list", "score", "data", _scores)}


def body_values(body: Mapping[str, Any]) -> dict[str, Any]:
    """The values in a body that `values_body` made; empty for a chat."""
    if "results" in body:
        return {"ranking": [{"index": each["index"], "score": each["relevance_score"]} for each in body["results"]]}
    if "choices" in body:
        first = body["choices"][0]
        found = {name: first[name] for name in ("loglikelihood", "tokens", "perplexity") if name in first}
        each = (first.get("logprobs") or {}).get("token_logprobs")
        return found if each is None else {**found, "token_logprobs": each}
    data = body["data"]
    if data[0].get("object") == "score":
        scores = [{"index": each["index"], "score": each["score"]} for each in data]
        return {"score": scores[0]["score"]} if len(data) == 1 else {"ranking": sorted(scores, key=lambda s: -s["score"])}
    if "label" in data[0]:
        return {"label": data[0]["label"], "scores": data[0]["scores"]}
    found = data[0]["embedding"]
    return {"embedding": np.frombuffer(base64.b64decode(found), "<f4").tolist() if isinstance(found, str) else found}
