"""The forms of requests and answers of the tasks other than a chat, over HTTP.

One request has the inputs of several rows, if the API takes them. An answer has one item a row, with its `index`.
The forms are those of OpenAI's `/embeddings` and `/completions`, of vLLM's `/score`, `/classify` and `/pooling`, and of
`/rerank` as Jina, Cohere and vLLM have it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pybase64

from engines.errors import EngineError, invalid
from engines.local.likelihood import likelihood_values
from engines.local.task_values import classify_values, rerank_values, shortened
from engines.remote.task_options import TaskOptions
from engines.remote.wire_format import bad_response, count, is_count
from engines.types import Request, clean_message
from engines.usage import Usage

# Embeddings that are decoded in one step: few enough to stay in the processor's cache.
AT_ONCE = 32

# The `values` of a row, or the reason why the server gave none for this row.
RowAnswer = dict[str, Any] | EngineError


@dataclass(frozen=True, slots=True)
class TaskFormat:
    """The form of one task's requests and answers."""

    path: str
    body: Callable[[Sequence[Request], TaskOptions], dict[str, Any]]  # the fields beside `model`
    read: Callable[[dict[str, Any], Sequence[Request], TaskOptions], list[RowAnswer]]
    single: bool = False  # a request has one row
    # The server turns the conversation into tokens first: `messages` of the body becomes `prompt`.
    tokenized: bool = False


def format_of(request: Request, options: TaskOptions, kind: str) -> TaskFormat:
    """The format of a row. Raises `EngineError("invalid_input")` if the provider's API has none for its input."""
    of_messages = bool(request.messages)
    found = FORMATS.get((request.task, of_messages))
    if found is None or (of_messages and not options.conversations):
        raise invalid(
            f"engine={kind} takes no conversation for task={request.task} "
            f"(engine.provider.tasks.{request.task}.conversations=true, if the server has vLLM's API)"
        )
    return found


def task_usage(payload: Mapping[str, Any]) -> Usage:
    """The token counts of an answer. Jina gives a total only, Cohere has its counts in `meta`."""
    found = payload.get("usage")
    if not isinstance(found, dict):
        meta = payload.get("meta")
        tokens = meta.get("tokens") if isinstance(meta, dict) else None
        found = {"prompt_tokens": tokens.get("input_tokens")} if isinstance(tokens, dict) else {}
    read = found.get("prompt_tokens", found.get("total_tokens"))
    return Usage(count(read), output=count(found.get("completion_tokens")), known=is_count(read))


def in_order(items: Any, rows: int, what: str, payload: Any) -> list[dict[str, Any]]:
    """The items of an answer in the order of the request's rows, by their `index`.

    Raises `EngineError` unless there is exactly one for each row. It is not retryable: the caller asks for fewer rows.
    """
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise bad_response(f"the answer has no {what}", payload)
    places = [item.get("index") for item in items]
    if places == list(range(rows)):  # most answers
        return items
    if not any(place is not None for place in places):
        places = list(range(len(items)))
    # Protobuf's JSON leaves out a 0.
    order = {count(place): item for place, item in zip(places, items, strict=True)}
    if len(items) != rows or order.keys() != set(range(rows)):
        text = f"the answer has {len(items)} {what} for {rows} inputs, or their 'index' is wrong"
        raise EngineError("bad_response", text, status=200, retryable=rows == 1)
    return [order[at] for at in range(rows)]


# -- embed ------------------------------------------------------------------------------------------------------------


def _embed_body(requests: Sequence[Request], options: TaskOptions) -> dict[str, Any]:
    body: dict[str, Any] = {"input": [request.inputs["text"] for request in requests]}
    if options.dimensions and (wanted := requests[0].generation.dimensions):
        body["dimensions"] = wanted
    if options.base64:
        body["encoding_format"] = "base64"
    return body


def _embed_read(payload: dict[str, Any], requests: Sequence[Request], options: TaskOptions) -> list[RowAnswer]:
    items = in_order(payload.get("data"), len(requests), "embeddings", payload)
    wanted = requests[0].generation.dimensions
    return [_values(vector, wanted) for vector in vectors([item.get("embedding") for item in items])]


def _values(vector: np.ndarray | EngineError, dimensions: int | None) -> RowAnswer:
    if isinstance(vector, EngineError):
        return vector
    if dimensions is None:
        return {"embedding": vector}
    try:
        # A server does not say if its embeddings are normalised.
        return {"embedding": shortened(vector, dimensions, abs(float(np.linalg.norm(vector)) - 1) < 1e-3)}
    except EngineError as error:
        return error


def vectors(found: Sequence[Any]) -> list[np.ndarray | EngineError]:
    """The numbers of embeddings: each is a JSON list, or base64 of float32 with the lowest byte first."""
    out: list[np.ndarray | EngineError] = []
    for start in range(0, len(found), AT_ONCE):
        part = found[start : start + AT_ONCE]
        matrix = _matrix(part)
        out.extend(map(_vector, part) if matrix is None else matrix)
    return out


def _matrix(found: Sequence[Any]) -> np.ndarray | None:
    """The numbers of embeddings that can be decoded in one step: texts of one length, without padding. Otherwise None."""
    if not all(isinstance(each, str) for each in found) or {(len(each), each[-1:] == "=") for each in found} != {
        (len(found[0]), False)
    }:
        return None
    try:
        matrix = np.frombuffer(pybase64.b64decode("".join(found), validate=True), "<f4").reshape(len(found), -1)
    except ValueError:  # one of them is bad
        return None
    return matrix if matrix.size and np.isfinite(matrix.sum(axis=1)).all() else None


def _vector(found: Any) -> np.ndarray | EngineError:
    try:
        if isinstance(found, str):
            vector = np.frombuffer(pybase64.b64decode(found, validate=True), "<f4")
        else:
            vector = np.asarray(found, np.float32)
        if vector.ndim == 1 and vector.size and np.isfinite(vector.sum()):
            return vector
    except (ValueError, TypeError):
        pass
    return EngineError("bad_response", f"the answer has no valid embedding: {str(found)[:100]}", status=200)


# -- classify, score, rerank ------------------------------------------------------------------------------------------


def _classify_body(requests: Sequence[Request], options: TaskOptions) -> dict[str, Any]:
    return {"input": [request.inputs["text"] for request in requests]}


def _messages_body(requests: Sequence[Request], options: TaskOptions) -> dict[str, Any]:
    return {"messages": [clean_message(message) for message in requests[0].messages]}


def _classify_read(payload: dict[str, Any], requests: Sequence[Request], options: TaskOptions) -> list[RowAnswer]:
    return [_classes(item, options) for item in in_order(payload.get("data"), len(requests), "classes", payload)]


def _classes(item: dict[str, Any], options: TaskOptions) -> RowAnswer:
    """`eagleray serve` names all classes. vLLM names the best one; the others have the labels in `options`, or the default
    names of Hugging Face."""
    if isinstance(item.get("scores"), list):
        return {"label": item.get("label"), "scores": item["scores"]}
    probabilities = item.get("probs")
    if not isinstance(probabilities, list) or not probabilities or not all(map(_is_number, probabilities)):
        return EngineError("bad_response", f"the answer has no probabilities: {str(item)[:200]}", status=200)
    labels = options.labels or [f"LABEL_{at}" for at in range(len(probabilities))]
    if len(labels) != len(probabilities):
        return invalid(
            f"the model has {len(probabilities)} classes; engine.provider.tasks.classify.labels has {len(labels)}"
        )
    if isinstance(item.get("label"), str):
        labels = [*labels]
        labels[probabilities.index(max(probabilities))] = item["label"]
    return classify_values(labels, probabilities)


def _score_body(requests: Sequence[Request], options: TaskOptions) -> dict[str, Any]:
    queries = [request.inputs["query"] for request in requests]
    return {"text_1": queries, "text_2": [request.inputs["text"] for request in requests]}


def _score_read(payload: dict[str, Any], requests: Sequence[Request], options: TaskOptions) -> list[RowAnswer]:
    return [_score(item.get("score")) for item in in_order(payload.get("data"), len(requests), "scores", payload)]


def _reward_body(requests: Sequence[Request], options: TaskOptions) -> dict[str, Any]:
    return {**_messages_body(requests, options), "use_activation": False}  # the model's own number, not a probability


def _reward_read(payload: dict[str, Any], requests: Sequence[Request], options: TaskOptions) -> list[RowAnswer]:
    [item] = in_order(payload.get("data"), 1, "scores", payload)
    found = item.get("data")
    while isinstance(found, list) and found and (len(found) == 1 or isinstance(found[0], list)):
        found = found[-1]  # a model that scores each token: that of the last one counts
    return [_score(found)]


def _score(found: Any) -> RowAnswer:
    if not _is_number(found):
        return EngineError("bad_response", f"the answer has no score: {str(found)[:100]}", status=200)
    return {"score": float(found)}


def _rerank_body(requests: Sequence[Request], options: TaskOptions) -> dict[str, Any]:
    return dict(requests[0].inputs)


def _rerank_read(payload: dict[str, Any], requests: Sequence[Request], options: TaskOptions) -> list[RowAnswer]:
    documents = len(requests[0].inputs["documents"])
    items = in_order(payload.get("results", payload.get("data")), documents, "scores", payload)
    scores: list[Any] = [item.get("relevance_score", item.get("score")) for item in items]
    if wrong := next((score for score in map(_score, scores) if isinstance(score, EngineError)), None):
        return [wrong]
    return [rerank_values(scores)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


# -- loglikelihood ----------------------------------------------------------------------------------------------------


def _likelihood_body(requests: Sequence[Request], options: TaskOptions) -> dict[str, Any]:
    """The server repeats the prompt with the log probabilities of its tokens. It also writes one token: some servers
    refuse to write none."""
    prompts = ["".join((request.inputs["prompt"], request.inputs["completion"])) for request in requests]
    return {"prompt": prompts, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}


def _likelihood_read(payload: dict[str, Any], requests: Sequence[Request], options: TaskOptions) -> list[RowAnswer]:
    items = in_order(payload.get("choices"), len(requests), "choices", payload)
    if isinstance(given := payload.get("prompt"), list) and len(given) == len(items):  # Together
        items = [prompt if isinstance(prompt, dict) else {} for prompt in given]
    return [_likelihood(item.get("logprobs"), request) for item, request in zip(items, requests, strict=True)]


def _likelihood(found: Any, request: Request) -> RowAnswer:
    """The values of one row. The completion begins at the first token that ends after the prompt's end.

    Without a prompt, the first token has no log probability, and is not counted.
    """
    found = found if isinstance(found, dict) else {}
    tokens, logprobs, offsets = found.get("tokens"), found.get("token_logprobs"), found.get("text_offset")
    if not isinstance(tokens, list) or not isinstance(logprobs, list) or len(tokens) != len(logprobs):
        return EngineError("bad_response", "the answer has no log probabilities of the prompt", status=200)
    prompt, end = len(request.inputs["prompt"]), len(request.inputs["prompt"]) + len(request.inputs["completion"])
    if not isinstance(offsets, list) or len(offsets) != len(tokens):
        offsets = [0]
        for token in tokens:
            offsets.append(offsets[-1] + len(token))
    ends = [*offsets[1 : len(tokens)], max(end, offsets[len(tokens) - 1] + 1)]
    own = [
        logprob
        for logprob, first, last in zip(logprobs, offsets, ends, strict=False)
        if prompt < last and first < end and last > first
    ]
    if not prompt and own[:1] == [None]:
        own = own[1:]
    if not own or not all(map(_is_number, own)):
        return invalid(
            "the completion has no token with a log probability: it is empty, or a single token without a prompt"
        )
    return likelihood_values(own, each=request.generation.logprobs is not None)


def _answer_body(requests: Sequence[Request], options: TaskOptions) -> dict[str, Any]:
    return {**_messages_body(requests, options), "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}


def _answer_read(payload: dict[str, Any], requests: Sequence[Request], options: TaskOptions) -> list[RowAnswer]:
    """`payload["answer"]` has the places of the answer's tokens."""
    [item] = in_order(payload.get("choices"), 1, "choices", payload)
    found = item.get("logprobs")
    start, end = payload["answer"]
    logprobs = found.get("token_logprobs") if isinstance(found, dict) else None
    own = logprobs[start:end] if isinstance(logprobs, list) else []
    if len(own) < end - start or not all(map(_is_number, own)):
        return [EngineError("bad_response", "the answer has no log probabilities of the prompt", status=200)]
    return [likelihood_values(own, each=requests[0].generation.logprobs is not None)]


# By task, and by the kind of the input: False is `Request.inputs`, True is `Request.messages`.
FORMATS: dict[tuple[str, bool], TaskFormat] = {
    ("embed", False): TaskFormat("embeddings", _embed_body, _embed_read),
    ("classify", False): TaskFormat("../classify", _classify_body, _classify_read),
    ("classify", True): TaskFormat("../classify", _messages_body, _classify_read, single=True),
    ("score", False): TaskFormat("../score", _score_body, _score_read),
    ("score", True): TaskFormat("../pooling", _reward_body, _reward_read, single=True),
    ("rerank", False): TaskFormat("rerank", _rerank_body, _rerank_read, single=True),
    ("loglikelihood", False): TaskFormat("completions", _likelihood_body, _likelihood_read),
    ("loglikelihood", True): TaskFormat("completions", _answer_body, _answer_read, single=True, tokenized=True),
}
