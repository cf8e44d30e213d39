"""The server's side of the tasks other than a chat: converts a body to one request for each text, and their completions to
one response. The forms are those of OpenAI and of vLLM.

Pure functions. `engines.remote.task_formats` is the client's side.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engines.errors import EngineError, Failure, invalid
from engines.params import GenerationParams
from engines.tasks import TASKS, check_inputs
from engines.types import Completion, Request, check_messages, with_effect
from engines.usage import Usage
from pipeline.config import ServeConfig
from pipeline.output.openai_bodies import values_body
from pipeline.serve.openai_api import check_media


@dataclass(slots=True)
class TaskCall:
    """The requests in a body, and what the form of the response needs."""

    task: str
    requests: list[Request]
    model: str
    options: dict[str, Any] = field(default_factory=dict)  # `encoding` of embeddings; `documents` and `top_n` of a ranking


# The inputs of each row, the generation parameters, and the options of a `TaskCall`, read from a body.
Read = tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]


def parse_task_call(path: str, body: Any, served: str, base: GenerationParams, limits: ServeConfig) -> TaskCall:
    """Checks and parses a body. Raises `EngineError` for an invalid one."""
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    route = ROUTES[path]
    model = body.get("model")
    if model not in (None, served):
        raise EngineError("not_found", f"The model '{model!s:.200}' does not exist; this endpoint serves '{served}'")
    if unknown := sorted(with_effect({name: value for name, value in body.items() if name not in route.fields})):
        raise invalid(f"{path} has no field {', '.join(unknown)[:200]}; it has {', '.join(sorted(route.fields))}")
    params = TASKS[route.task].params or frozenset()
    own = GenerationParams.parse({name: value for name, value in base.values.items() if name in params})
    if "messages" in body and body["messages"] is not None:
        messages = check_messages(body["messages"])
        check_media(messages, limits)
        check_inputs(route.task, messages, {})
        return TaskCall(route.task, [Request(messages, own, task=route.task)], served)
    rows, generation, options = route.read(body)
    texts = max(len(rows), *(len(row.get("documents", ())) for row in rows))
    if texts > limits.max_texts:
        raise invalid(f"a request may have at most {limits.max_texts:,} texts, not {texts:,} (serve.max_texts)")
    own = own.override({name: value for name, value in generation.items() if value is not None})
    for row in rows:
        check_inputs(route.task, [], row)
    requests = [Request([], own, task=route.task, inputs=row) for row in rows]
    return TaskCall(route.task, requests, served, options)


def _texts(body: Mapping[str, Any], name: str) -> list[str]:
    """A text, or a list of texts."""
    found = body.get(name)
    if isinstance(found, str):
        return [found]
    if isinstance(found, list) and found and all(isinstance(each, str) for each in found):
        return found
    if isinstance(found, list) and found and all(isinstance(each, (int, list)) for each in found):
        raise invalid(f"{name} must be a text or a list of texts; lists of token ids are not supported")
    raise invalid(f"{name} must be a text or a list of at least one text")


def _embeddings(body: Mapping[str, Any]) -> Read:
    encoding = body.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise invalid(f"encoding_format must be float or base64, not {encoding!r:.40}")
    rows: list[dict[str, Any]] = [{"text": text} for text in _texts(body, "input")]
    return rows, {"dimensions": body.get("dimensions")}, {"encoding": encoding}


def _classes(body: Mapping[str, Any]) -> Read:
    return [{"text": text} for text in _texts(body, "input")], {}, {}


def _scores(body: Mapping[str, Any]) -> Read:
    """Pairs: one query and one or several texts, or as many queries as texts."""
    first, second = ("queries", "documents") if "queries" in body else ("text_1", "text_2")
    queries, texts = _texts(body, first), _texts(body, second)
    if len(queries) == 1:
        queries = queries * len(texts)
    if len(queries) != len(texts):
        raise invalid(f"{first} must have one text, or as many as {second}: {len(queries):,} and {len(texts):,}")
    return [{"query": query, "text": text} for query, text in zip(queries, texts, strict=True)], {}, {}


def _ranking(body: Mapping[str, Any]) -> Read:
    given = body.get("documents")
    documents = (
        [each.get("text") if isinstance(each, dict) else each for each in given] if isinstance(given, list) else given
    )
    documents, top = _texts({"documents": documents}, "documents"), body.get("top_n")
    if top is not None and (not isinstance(top, int) or top < 0):
        raise invalid("top_n must be a whole number")
    shown = documents if body.get("return_documents", True) else None
    return [{"query": body.get("query"), "documents": documents}], {}, {"documents": shown, "top_n": top}


def _likelihoods(body: Mapping[str, Any]) -> Read:
    if body.get("echo") is not True or body.get("max_tokens") != 0 or body.get("logprobs") is None:
        raise invalid(
            "no engine continues a plain text: use /v1/chat/completions. /v1/completions gives the log probabilities of a "
            "text, with echo=true, max_tokens=0 and logprobs=0"
        )
    return [{"prompt": "", "completion": text} for text in _texts(body, "prompt")], {"logprobs": 0}, {}


@dataclass(frozen=True, slots=True)
class Route:
    task: str
    read: Callable[[Mapping[str, Any]], Read]
    fields: frozenset[str]


_EMBEDDINGS = Route("embed", _embeddings, frozenset(("model", "input", "dimensions", "encoding_format")))
_CLASSIFY = Route("classify", _classes, frozenset(("model", "input", "messages")))
_SCORE = Route("score", _scores, frozenset(("model", "text_1", "text_2", "queries", "documents", "messages")))
_RERANK = Route("rerank", _ranking, frozenset(("model", "query", "documents", "top_n", "return_documents")))
_COMPLETIONS = Route(
    "loglikelihood", _likelihoods, frozenset(("model", "prompt", "echo", "max_tokens", "logprobs", "temperature", "stream"))
)
# vLLM has /score, /rerank and /classify also without /v1.
ROUTES = {
    "/v1/embeddings": _EMBEDDINGS, "/v1/completions": _COMPLETIONS,
    "/v1/score": _SCORE, "/score": _SCORE, "/v1/rerank": _RERANK, "/v2/rerank": _RERANK, "/rerank": _RERANK,
    "/v1/classify": _CLASSIFY, "/classify": _CLASSIFY,
}  # fmt: skip


def first_failure(completions: Sequence[Completion]) -> Failure | None:
    """The first error; of several texts, with the number of its text."""
    for at, completion in enumerate(completions):
        if (failure := completion.error) is not None:
            return failure if len(completions) == 1 else replace(failure, message=f"text {at}: {failure.message}")
    return None


def task_response(call: TaskCall, completions: Sequence[Completion]) -> dict[str, Any]:
    """The values of all rows as one body."""
    encoding = call.options.get("encoding")
    usage = Usage()
    for completion in completions:
        usage.add(completion.usage)
    counts = {"input": usage.input} if usage.known else None
    whole, key, items = dict[str, Any](), "", list[Any]()
    for request, completion in zip(call.requests, completions, strict=True):
        inputs = {**request.inputs, **call.options}
        whole = values_body(call.task, 0, completion.values, inputs, call.model, counts, encoding=encoding)
        [key] = whole.keys() & {"data", "results", "choices"}
        items += [{**item, "index": item["index"] + len(items)} for item in whole[key]]
    if call.task == "classify":
        for item in items:
            item["probs"] = [score["score"] for score in item["scores"]]
    prefix = str(whole["id"]).partition("-")[0]
    return {**whole, key: items, "id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
