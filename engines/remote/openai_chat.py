"""The wire format of OpenAI's chat completions, which most providers and servers take.

https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from engines.errors import EngineError, invalid
from engines.params import json_schema_of
from engines.remote.content import ImageBlock, parse, tool_call
from engines.remote.errors import failure
from engines.remote.provider import Provider, put
from engines.remote.schemas import exceeds_limits, provider_schema
from engines.remote.wire_format import (
    Ending,
    bad_response,
    complete,
    count,
    finish_reason,
    is_count,
)
from engines.types import Choice, Completion, Delta, Message, Request, ToolCall, clean_message
from engines.usage import Usage

STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
ROW_FIELDS: frozenset[str] | None = None  # each server has fields of its own, and refuses those that it does not know
# OpenAI's own reasons, then those that several servers add. What one provider adds is in its file in conf/engine.
FINISH_REASONS: dict[str, Ending] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
    "model_length": "length",  # Mistral: the model's context is full
    "error": "server",  # OpenRouter, Mistral, vLLM
    "abort": "server",  # vLLM, SGLang
}
_PLAIN = frozenset((
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "seed", "n", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "logit_bias", "tool_choice", "reasoning_effort",
))  # fmt: skip
# Fields of an answer's message that hold its reasoning; `Provider.reasoning_history` says which requests repeat them.
_REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking_blocks")
# Further fields of an answer's message that its conversation keeps. `extra_content`: Gemini's thought signature.
_KEPT = (*_REASONING, "extra_content", "refusal", "annotations", "audio", "images")
# Those of them that belong to an answer only.
_ANSWER_ONLY = ("annotations", "images")


def body(request: Request, model: str | None, provider: Provider) -> dict[str, Any]:
    """The body of a request. Raises `EngineError("invalid_input")` for what this API cannot take."""
    generation = request.generation
    out: dict[str, Any] = {"model": model, "messages": [_message(message, provider) for message in request.messages]}
    for name, value in generation.values.items():
        if name in _PLAIN:
            provider.place(out, name, value)
    if generation.logprobs is not None:
        out["logprobs"] = True
        if generation.logprobs:
            out["top_logprobs"] = generation.logprobs
    if generation.tools:
        out["tools"] = [_tool(tool, provider) for tool in generation.tools]
    if generation.response_format is not None:
        _response_format(out, generation.response_format, provider)
    if request.continue_answer:
        provider.begin_answer(out)
    return out


def _message(message: Message, provider: Provider) -> dict[str, Any]:
    out = clean_message(message)
    if out["role"] == "developer" and not provider.developer_role:
        out["role"] = "system"
    content = message.get("content")
    if isinstance(content, list):
        out["content"] = [_part(part) for part in content]
    if out["role"] == "assistant":
        for name in _ANSWER_ONLY:
            out.pop(name, None)
        if isinstance(audio := out.get("audio"), dict) and "id" in audio:
            out["audio"] = {"id": audio["id"]}
        repeats = provider.reasoning_history
        if repeats == "none" or (repeats == "tool_calls" and not message.get("tool_calls")):
            for name in _REASONING:
                out.pop(name, None)
    return out


def _part(part: Mapping[str, Any]) -> Any:
    block = parse(part)
    if not isinstance(block, ImageBlock):
        return part  # this format's own form
    given = part.get("image_url")
    return {**part, "image_url": {**(given if isinstance(given, dict) else {}), "url": block.image.data_url()}}


def _tool(tool: dict[str, Any], provider: Provider) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("parameters"), dict):
        return tool
    subset = provider.schemas if function.get("strict") else None
    parameters = provider_schema(function["parameters"], subset, provider.inline_refs)
    return {**tool, "function": {**function, "parameters": parameters}}


def _response_format(out: dict[str, Any], given: dict[str, Any], provider: Provider) -> None:
    kind = given["type"]
    if kind in provider.formats:
        value = json_schema_of(given) if kind == "json_schema" else given.get(kind)
        if value is None:
            raise invalid(f"response_format of type {kind} needs a '{kind}'")
        put(out, provider.formats[kind], value)
        if isinstance(inside := out.get("response_format"), dict):  # Fireworks
            inside["type"] = kind
    elif kind == "json_schema":
        out["response_format"] = {"type": "json_schema", "json_schema": _json_schema(given, provider)}
    else:
        out["response_format"] = given


def _json_schema(given: dict[str, Any], provider: Provider) -> dict[str, Any]:
    """The field `json_schema`. If the API has a strict mode, it is used for every schema that can be expressed in it."""
    schema = json_schema_of(given)
    outer = given.get("json_schema")
    named = dict(outer) if isinstance(outer, Mapping) and "schema" in outer else {}
    named["name"] = named.get("name") or re.sub(r"[^A-Za-z0-9_-]+", "_", str(schema.get("title") or "answer"))[:64]
    if provider.schemas and named.get("strict") is not False:
        try:
            converted = provider_schema(schema, provider.schemas, provider.inline_refs)
            if named.get("strict") or not exceeds_limits(converted):
                return {**named, "strict": True, "schema": converted}
        except EngineError:
            if named.get("strict"):
                raise
    return {**named, "schema": provider_schema(schema, None, provider.inline_refs)}


def usage(payload: dict[str, Any]) -> Usage:
    """The token counts of an answer, with the variants of DeepSeek (prompt_cache_hit_tokens), OpenRouter
    (cache_write_tokens), xAI and Gemini (reasoning beside the completion)."""
    found = payload.get("usage")
    if not isinstance(found, dict):
        return Usage(known=False)
    given_read, given_written = found.get("prompt_tokens"), found.get("completion_tokens")
    read, written, known = count(given_read), count(given_written), is_count(given_read) and is_count(given_written)
    if known and len(found) == 3 and found.get("total_tokens") == read + written:  # nothing beside the two counts
        return Usage(read, output=written, known=known)
    into, out_of = _details(found.get("prompt_tokens_details")), _details(found.get("completion_tokens_details"))
    cached = into.get("cached_tokens", found.get("prompt_cache_hit_tokens"))
    reasoning = count(out_of.get("reasoning_tokens"))
    # Some do not count reasoning as part of the completion; then `total_tokens` is more than the sum of both counts.
    beside = count(found.get("total_tokens")) - read - written
    if read and beside > 0 and beside == (reasoning or beside):
        written, reasoning = written + beside, beside
    return Usage(
        read, count(cached), written, count(into.get("cache_write_tokens")), reasoning, known=known
    )  # fmt: skip


def _details(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def completion(payload: dict[str, Any], provider: Provider) -> Completion:
    """Reads an answer; choices are in the order of their `index`. Raises `EngineError`."""
    found = payload.get("choices")
    if payload.get("error"):
        raise _reported_error(payload["error"])
    if not isinstance(found, list) or not found:
        raise bad_response("the answer has no choices", payload)
    if not all(isinstance(item, dict) for item in found):
        raise bad_response("a choice is not an object", payload)
    if len(found) > 1:
        order = {id(item): count(item.get("index")) if is_count(item.get("index")) else at for at, item in enumerate(found)}
        found = sorted(found, key=lambda item: order[id(item)])
    choices = [_choice(item, payload, provider) for item in found]
    reasoning = next((text for choice in choices if (text := _reasoning(choice.message))), None)
    return complete(choices, usage(payload), payload.get("model"), reasoning)


def _choice(item: dict[str, Any], payload: dict[str, Any], provider: Provider) -> Choice:
    if item.get("error"):  # OpenRouter, beside the text that came before it
        raise _reported_error(item["error"])
    message = item.get("message")
    if not isinstance(message, dict):
        raise bad_response("a choice has no message", payload)
    finish = finish_reason(item.get("finish_reason"), FINISH_REASONS, provider)
    more = {name: value for name, value in message.items() if value and name not in ("role", "content")}
    if not more and finish != "tool_calls" and type(text := message.get("content")) is str:  # most answers
        return Choice({"role": "assistant", "content": text}, finish, _logprobs(item))
    text, calls = _text(message.get("content")), tool_calls(message)
    if finish == "stop" and calls:
        finish = "tool_calls"
    if message.get("refusal") and not text and not calls:
        finish = "content_filter"
    if finish == "tool_calls" and not calls:
        raise bad_response("the answer calls a tool, but has no call in it", payload)
    out: Message = {"role": "assistant", "content": text}
    out.update({name: value for name, value in more.items() if name in _KEPT})  # type: ignore[typeddict-item]
    if (thought := _thought(message.get("content"))) and not _reasoning(out):
        out["reasoning_content"] = thought  # type: ignore[typeddict-unknown-key]
    if text is None and finish == "stop" and not _reasoning(out) and not out.keys() & {"audio", "images"}:
        raise bad_response("the answer is null", payload)
    if calls:
        out["tool_calls"] = calls
    return Choice(out, finish, _logprobs(item))


def _logprobs(item: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    logprobs = item.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    return content if isinstance(content, list) else None


def _reported_error(error: Any) -> EngineError:
    """The error in an answer of status 200, by the HTTP status that it names."""
    code = error.get("code") if isinstance(error, dict) else None
    return failure(code if isinstance(code, int) and 400 <= code < 600 else 502, orjson.dumps({"error": error}), {})


def _reasoning(message: Mapping[str, Any]) -> str | None:
    found = message.get("reasoning_content") or message.get("reasoning")
    return found if isinstance(found, str) else None


def _text(content: Any) -> str | None:
    if isinstance(content, list):  # some answer in parts
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        return "".join(texts) if texts else None
    return content if isinstance(content, str) else None


def _thought(content: Any) -> str | None:
    """The reasoning in Mistral's content parts of type `thinking`."""
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    return "".join(_text(part.get("thinking")) or "" for part in parts if part.get("type") == "thinking") or None


def tool_calls(message: Mapping[str, Any]) -> list[ToolCall]:
    """The calls in a message, with what the provider added to them; the legacy `function_call` is one of them."""
    found, legacy = message.get("tool_calls"), message.get("function_call")
    if not found and isinstance(legacy, dict):
        found = [{"function": legacy}]
    calls: list[ToolCall] = []
    for at, call in enumerate(found if isinstance(found, list) else ()):
        if not isinstance(call, dict):
            continue
        function, id = call.get("function"), call.get("id") or f"call_{at}"
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            read: ToolCall = tool_call(id, function["name"], function.get("arguments"))
        elif call.get("type") in (None, "function"):
            continue  # it names no function
        else:
            read = {"id": str(id), "type": str(call["type"])}
        added = {name: value for name, value in call.items() if name not in ("index", *read) and value is not None}
        calls.append({**read, **added})
    return calls


def accumulator() -> ChatAccumulator:
    return ChatAccumulator()


class ChatAccumulator:
    """Joins the events of a streamed answer to the payload of one that is not streamed."""

    def __init__(self) -> None:
        self.whole: dict[str, Any] = {}
        self.choices: dict[int, dict[str, Any]] = {}

    @property
    def finished(self) -> bool:
        return bool(self.choices) and all(choice["finish_reason"] for choice in self.choices.values())

    def add(self, event: dict[str, Any]) -> Iterator[Delta]:
        self.whole.update({name: event[name] for name in ("model", "usage") if event.get(name)})
        found = event.get("choices")
        for item in found if isinstance(found, list) else ():
            at = count(item.get("index"))
            empty = {"index": at, "message": {"content": None}, "finish_reason": None}
            choice = self.choices.setdefault(at, empty)
            choice.update({name: item[name] for name in ("finish_reason", "error") if item.get(name)})
            logprobs = item.get("logprobs")
            if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
                choice.setdefault("logprobs", {"content": []})["content"] += logprobs["content"]
            delta, message = item.get("delta") or {}, choice["message"]
            _join_message(message, delta)
            content = delta.get("content")
            text, thought = _text(content), _reasoning(delta) or _thought(content)
            if text or thought:
                yield Delta(text or "", (thought or "") if not at else "", at)

    def payload(self) -> dict[str, Any]:
        return {**self.whole, "choices": [choice for _, choice in sorted(self.choices.items())]}


def _join_message(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Adds one delta to a choice's message."""
    for name in ("content", *_KEPT):
        piece = delta.get(name)
        if isinstance(piece, dict):
            message.setdefault(name, {}).update(piece)
        elif isinstance(piece, (str, list)):
            message[name] = _joined(message[name], piece) if message.get(name) else piece
    calls = message.setdefault("tool_calls", [])
    for call in delta.get("tool_calls") or ():
        place = call.get("index")
        _join_call(calls, count(place) if place is not None else len(calls), call)
    if legacy := delta.get("function_call"):
        _join_call(calls, 0, {"function": legacy})


def _joined(before: str | list[Any], piece: str | list[Any]) -> str | list[Any]:
    """Mistral's reasoning models send lists of parts first, and then texts."""
    if isinstance(before, str) and isinstance(piece, str):
        return before + piece
    whole = _parts(before)
    whole += _parts(piece)
    return whole


def _parts(content: str | list[Any]) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _join_call(calls: list[dict[str, Any]], place: int, piece: dict[str, Any]) -> None:
    """Adds a piece of a tool call. The name comes first, the arguments (or the input of a custom tool) in pieces.

    Gemini gives all calls the index 0: a name with another id begins a new call.
    """
    call = next((each for each in reversed(calls) if each["index"] == place), None)
    if call is None or (piece.get("id") and call.get("id") not in (None, piece["id"]) and _names(piece)):
        call = {"index": place}
        calls.append(call)
    call.update({name: value for name, value in piece.items() if value and name not in ("index", "function", "custom")})
    for kind, given in (("function", "arguments"), ("custom", "input")):
        if not isinstance(part := piece.get(kind), dict):
            continue
        joined = call.setdefault(kind, {given: ""})
        if part.get("name"):
            joined["name"] = part["name"]
        if isinstance(text := part.get(given), str):
            joined[given] += text


def _names(piece: dict[str, Any]) -> bool:
    """True if the piece of a call names what is called."""
    return any(isinstance(part := piece.get(kind), dict) and part.get("name") for kind in ("function", "custom"))
