"""The server's side of OpenAI's chat completions: converts a body to a request, and a completion or its deltas to a
response.

Pure functions. `engines.remote.openai_chat` is the client's side of the same wire.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from engines.errors import EngineError, Failure, invalid
from engines.params import GenerationParams
from engines.types import Choice, Completion, Delta, Request
from engines.usage import Usage
from pipeline.dataset.formats import RowParser
from pipeline.storage.exact_json import dumps

# The limit of OpenAI. Each choice is a separate sequence in the engine.
MOST_CHOICES = 128

_STATUSES = {"invalid_input": 400, "context_length": 400, "content_filter": 400, "bad_request": 400, "auth": 401,
             "not_found": 404, "rate_limit": 429, "engine_crash": 503, "cancelled": 503, "timeout": 504,
             "connection": 502, "bad_response": 502}  # fmt: skip
_CODES = {"context_length": "context_length_exceeded", "not_found": "model_not_found", "auth": "invalid_api_key"}

_PARSER = RowParser("openai_batch")  # the lines of OpenAI batch files contain the same bodies


@dataclass(slots=True)
class ChatRequest:
    """The request in a body, and the form of its response."""

    request: Request
    model: str
    stream: bool
    include_usage: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


def parse_chat_request(body: Any, served: str, base: GenerationParams) -> ChatRequest:
    """Checks and parses a body. Raises `EngineError` for an invalid one.

    Clients are not trusted like the person who started the server: a body must not choose another paid model, read a local
    file, or load weights.
    """
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    if body.get("adapter") is not None:
        raise invalid("adapter: whoever serves chooses the adapter, not a request")
    parsed = _PARSER.parse({"body": body})
    for i, message in enumerate(parsed.messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            source = part.get("image_url")
            url = source.get("url") if isinstance(source, dict) else source
            if part["type"] == "image_url" and not str(url).startswith(("http://", "https://", "data:")):
                raise invalid(f"messages[{i}]: an image must be an http(s) or data URL")
    if parsed.model not in (None, served):
        raise EngineError("not_found", f"The model '{parsed.model:.200}' does not exist; this endpoint serves '{served}'")
    generation = base.override(parsed.generation)
    if (generation.n or 1) > MOST_CHOICES:
        raise invalid(f"n may be at most {MOST_CHOICES}")
    options = body.get("stream_options")
    include_usage = isinstance(options, dict) and options.get("include_usage") is True
    return ChatRequest(Request(parsed.messages, generation), served, body.get("stream") is True, include_usage)


def whole(request: ChatRequest, completion: Completion) -> dict[str, Any]:
    """The answer as one JSON object."""
    choices = []
    for at, choice in enumerate(completion.choices):
        message = {**choice.message, "refusal": None}
        if completion.reasoning and not at:
            message["reasoning_content"] = completion.reasoning
        end = {"logprobs": _logprobs(choice), "finish_reason": choice.finish_reason}
        choices.append({"index": at, "message": message, **end})
    return {**_head(request, "chat.completion"), "choices": choices, "usage": _usage(completion.usage)}


def _head(request: ChatRequest, kind: str) -> dict[str, Any]:
    return {"id": request.id, "object": kind, "created": request.created, "model": request.model}


def _usage(usage: Usage) -> dict[str, Any] | None:
    if not usage.known:
        return None
    return {"prompt_tokens": usage.input, "completion_tokens": usage.output, "total_tokens": usage.input + usage.output,
            "prompt_tokens_details": {"cached_tokens": usage.cached_input},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning}}  # fmt: skip


def _logprobs(choice: Choice) -> dict[str, Any] | None:
    return {"content": choice.logprobs, "refusal": None} if choice.logprobs is not None else None


class Chunks:
    """Converts an answer to a stream of server-sent events."""

    def __init__(self, request: ChatRequest) -> None:
        self.request = request
        self.opened: set[int] = set()

    def piece(self, delta: Delta) -> bytes:
        """The event for one delta."""
        found = {"content": delta.text} if delta.text else {}
        if delta.reasoning:
            found["reasoning_content"] = delta.reasoning
        return self._chunk(delta.index, found)

    def end(self, completion: Completion) -> Iterator[bytes]:
        """The events after the last delta: an error; or tool calls, log probabilities, finish reasons and the usage."""
        if completion.error is not None:
            yield event(error_body(completion.error))
            return
        for at, choice in enumerate(completion.choices):
            calls = [{"index": i, **call} for i, call in enumerate(choice.message.get("tool_calls") or ())]
            if calls or choice.logprobs is not None or at not in self.opened:
                yield self._chunk(at, {"tool_calls": calls} if calls else {"content": ""}, _logprobs(choice))
            yield self._chunk(at, {}, finish=choice.finish_reason)
        if self.request.include_usage:
            yield event({**_head(self.request, "chat.completion.chunk"), "choices": [], "usage": _usage(completion.usage)})
        yield b"data: [DONE]\n\n"

    def _chunk(self, at: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> bytes:
        if at not in self.opened:
            self.opened.add(at)
            delta = {"role": "assistant", **delta}
        choice = {"index": at, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({**_head(self.request, "chat.completion.chunk"), "choices": [choice]})


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event with a JSON value."""
    return b"data: " + dumps(value) + b"\n\n"


def status_of(failure: Failure) -> int:
    """The HTTP status of a failed request: that of the provider behind the engine, or one that fits the error's type."""
    if failure.status is not None and failure.status >= 400:
        return failure.status
    return _STATUSES.get(failure.type, 500)


def error_body(failure: Failure) -> dict[str, Any]:
    """The body of an error response in OpenAI's form."""
    status = status_of(failure)
    kind = {401: "authentication_error", 403: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    code = _CODES.get(failure.type, failure.type)
    return {"error": {"message": failure.message, "type": kind, "param": None, "code": code}}
