"""The server's side of OpenAI's chat completions: converts a body to a request, and a completion or its deltas to a
response.

Pure functions. `engines.remote.openai_chat` is the client's side of the same wire.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from engines.errors import EngineError, invalid
from engines.media import MEDIA_KEYS, media_in, source_of, url_of
from engines.params import GenerationParams
from engines.text import counted
from engines.types import Choice, Completion, Delta, Message, Request, with_effect
from engines.usage import Usage
from pipeline.config import ServeConfig
from pipeline.dataset.formats import RowParser
from pipeline.serve.errors import error_body
from pipeline.storage.exact_json import dumps

# Engines look for each stop text after each token.
MOST_STOPS, LONGEST_STOP = 64, 1000

_PARSER = RowParser("openai_batch", last_answer="keep")  # the lines of OpenAI batch files contain the same bodies


@dataclass(slots=True)
class ChatRequest:
    """The request in a body, and the form of its response."""

    request: Request
    model: str
    stream: bool
    include_usage: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


def parse_chat_request(body: Any, served: str, base: GenerationParams, limits: ServeConfig) -> ChatRequest:
    """Checks and parses a body. Raises `EngineError` for an invalid one.

    Clients are not trusted like the person who started the server: a body must not choose another paid model, read a local
    file, load weights, or ask for more than `limits` allows.
    """
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    if body.get("adapter") is not None:
        raise invalid("adapter: a request cannot choose it; eagleray serve has engine.adapter")
    parsed = _PARSER.parse({"body": body})
    if unknown := sorted(with_effect(parsed.extra_body)):
        raise invalid(
            f"there is no field {', '.join(unknown)[:200]}; engine.extra_body of the server adds fields to requests"
        )
    if parsed.model not in (None, served):
        raise EngineError("not_found", f"The model '{parsed.model:.200}' does not exist; this endpoint serves '{served}'")
    check_media(parsed.messages, limits)
    generation = base.override(parsed.generation)
    _check_limits(generation, parsed.generation, limits)
    if generation.max_tokens is None:
        generation = replace(generation, max_tokens=limits.max_tokens)
    options = body.get("stream_options")
    include_usage = isinstance(options, dict) and options.get("include_usage") is True
    return ChatRequest(Request(parsed.messages, generation), served, body.get("stream") is True, include_usage)


def check_media(messages: list[Message], limits: ServeConfig) -> None:
    media = 0
    for i, message in enumerate(messages):
        for part, key in media_in([message.get("content")]):
            media += 1
            if source_of(url_of(part, key)) == "file":
                raise invalid(f"messages[{i}]: the {MEDIA_KEYS[key]} must be at an http(s) or data URL")
    if media > limits.max_images:
        raise invalid(f"a request may have at most {counted(limits.max_images, 'image')} (serve.max_images)")


def _check_limits(generation: GenerationParams, given: Collection[str], limits: ServeConfig) -> None:
    """Refuses values of a request above the limits. The defaults of the server itself may be higher."""
    for name, most, key in (
        ("n", limits.max_n, "max_n"),
        ("max_tokens", limits.max_tokens, "max_tokens"),
        ("logprobs", limits.max_logprobs, "max_logprobs"),
        ("schema_retries", limits.max_schema_retries, "max_schema_retries"),
    ):
        value = getattr(generation, name)
        if name in given and most is not None and value is not None and value > most:
            raise invalid(f"{name} may be at most {most} (serve.{key})")
    stops = generation.stop or () if "stop" in given else ()
    if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
        raise invalid(f"stop may have at most {MOST_STOPS} texts of {LONGEST_STOP:,} characters")


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
