"""The wire of OpenAI's chat completions, which most providers and servers speak.

https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from engines.errors import EngineError, invalid
from engines.media import image_of
from engines.params import json_schema_of
from engines.remote.provider import Provider, inline_refs, put
from engines.types import Choice, Completion, Delta, FinishReason, Message, Request, ToolCall
from engines.usage import Usage

_PLAIN = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "seed", "n", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "logit_bias", "tool_choice", "reasoning_effort",
)  # fmt: skip

# What a request says beside the rest to be answered piece by piece.
STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}

_FINISH: dict[str, FinishReason] = {
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


def body(request: Request, model: str | None, provider: Provider) -> dict[str, Any]:
    """The request's JSON. Raises `EngineError("invalid_input")` for what cannot be said on this wire."""
    generation = request.generation
    out: dict[str, Any] = {"model": model, "messages": [_message(message, provider) for message in request.messages]}
    for name in _PLAIN:
        value = getattr(generation, name)
        if value is not None:
            provider.place(out, name, value)
    if generation.logprobs is not None:
        out["logprobs"] = True
        if generation.logprobs:
            out["top_logprobs"] = generation.logprobs
    if generation.tools:
        out["tools"] = [_tool(tool, provider) for tool in generation.tools]
    if generation.response_format is not None:
        _response_format(out, generation.response_format, provider)
    return out


def _message(message: Message, provider: Provider) -> dict[str, Any]:
    out: dict[str, Any] = dict(message)
    if out["role"] == "developer" and not provider.developer_role:
        out["role"] = "system"
    content = message.get("content")
    if isinstance(content, list):
        out["content"] = [_part(part) for part in content]
    return out


def _part(part: Mapping[str, Any]) -> Any:
    if part["type"] != "image_url":
        return part
    given = part.get("image_url")
    return {**part, "image_url": {**(given if isinstance(given, dict) else {}), "url": image_of(part).data_url()}}


def _tool(tool: dict[str, Any], provider: Provider) -> dict[str, Any]:
    function = tool.get("function")
    if not provider.inline_refs or not isinstance(function, dict) or "parameters" not in function:
        return tool
    return {**tool, "function": {**function, "parameters": inlined(function["parameters"])}}


def inlined(schema: Any) -> Any:
    try:
        return inline_refs(schema)
    except ValueError as error:
        raise invalid(str(error)) from None


def _response_format(out: dict[str, Any], given: dict[str, Any], provider: Provider) -> None:
    kind = given["type"]
    if kind in provider.formats:
        value = json_schema_of(given) if kind == "json_schema" else given.get(kind)
        if value is None:
            raise invalid(f"response_format of type {kind} needs a '{kind}'")
        put(out, provider.formats[kind], value)
    elif kind == "json_schema":
        schema = json_schema_of(given)
        outer = given.get("json_schema")
        named = dict(outer) if isinstance(outer, Mapping) and "schema" in outer else {}
        name = named.get("name") or re.sub(r"[^A-Za-z0-9_-]+", "_", str(schema.get("title") or "answer"))[:64]
        out["response_format"] = {
            "type": "json_schema",
            "json_schema": {**named, "name": name, "schema": inlined(schema) if provider.inline_refs else schema},
        }
    else:
        out["response_format"] = given


def completion(payload: dict[str, Any], _: Provider) -> Completion:
    """A whole answer, read leniently. Raises `EngineError` where there is none in it, with the usage that is paid."""
    usage = _usage(payload.get("usage"))
    try:
        return _completion(payload, usage)
    except EngineError as error:
        error.usage = usage
        raise


def _completion(payload: dict[str, Any], usage: Usage) -> Completion:
    found = payload.get("choices")
    if not isinstance(found, list) or not found:
        raise bad_response("the answer has no choices", payload)
    choices, reasoning = [], None
    for item in found:
        message = item.get("message") if isinstance(item, dict) else None
        if not isinstance(message, dict):
            raise bad_response("a choice has no message", payload)
        text, calls = _text(message.get("content")), tool_calls(message.get("tool_calls"))
        thought = message.get("reasoning_content") or message.get("reasoning")
        if isinstance(thought, str) and reasoning is None:
            reasoning = thought
        finish: FinishReason = _FINISH.get(str(item.get("finish_reason")), "tool_calls" if calls else "stop")
        refusal = message.get("refusal")
        if isinstance(refusal, str) and refusal and not text and not calls:
            raise EngineError("content_filter", f"the model refused: {refusal[:500]}")
        if finish == "content_filter" and not text:
            raise EngineError("content_filter", "the provider's filter removed the answer")
        if text is None and not calls and finish == "stop" and not thought:
            raise bad_response("the answer is null", payload)
        out: Message = {"role": "assistant", "content": text}
        if calls:
            out["tool_calls"] = calls
        logprobs = item.get("logprobs")
        content = logprobs.get("content") if isinstance(logprobs, dict) else None
        choices.append(Choice(out, finish, content if isinstance(content, list) else None))
    model = payload.get("model")
    return Completion(choices, usage, model if isinstance(model, str) else None, reasoning=reasoning)


class ChatAccumulator:
    """A streamed answer's chunks, joined to what a plain answer is (see `engines.remote.sse`)."""

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
            empty = {"message": {"content": None}, "finish_reason": None}
            choice = self.choices.setdefault(at, empty)
            choice["finish_reason"] = item.get("finish_reason") or choice["finish_reason"]
            logprobs = item.get("logprobs")
            if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
                choice.setdefault("logprobs", {"content": []})["content"] += logprobs["content"]
            delta, message = item.get("delta") or {}, choice["message"]
            for name in ("content", "reasoning_content", "reasoning", "refusal"):
                if isinstance(delta.get(name), str):
                    message[name] = (message.get(name) or "") + delta[name]
            calls = message.setdefault("tool_calls", [])
            for call in delta.get("tool_calls") or ():
                place = call.get("index")
                _join_call(calls, count(place) if place is not None else len(calls), call)
            text, thought = delta.get("content"), delta.get("reasoning_content") or delta.get("reasoning")
            if text or thought:
                yield Delta(text or "", (thought or "") if not at else "", at)

    def payload(self) -> dict[str, Any]:
        return {**self.whole, "choices": [choice for _, choice in sorted(self.choices.items())]}


def _join_call(calls: list[dict[str, Any]], at: int, piece: dict[str, Any]) -> None:
    """A call's name comes first, its arguments in pieces."""
    at = min(at, len(calls))  # whatever number a server gives it
    if at == len(calls):
        calls.append({"function": {"arguments": ""}})
    function = piece.get("function") or {}
    if piece.get("id"):
        calls[at]["id"] = piece["id"]
    if function.get("name"):
        calls[at]["function"]["name"] = function["name"]
    if isinstance(arguments := function.get("arguments"), str):
        calls[at]["function"]["arguments"] += arguments


def _text(content: Any) -> str | None:
    if isinstance(content, list):  # some answer in parts
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        return "".join(texts) if texts else None
    return content if isinstance(content, str) else None


def tool_calls(found: Any) -> list[ToolCall]:
    """The calls in a message; arguments given as an object become JSON text."""
    calls: list[ToolCall] = []
    for at, call in enumerate(found if isinstance(found, list) else ()):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            continue
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else orjson.dumps(arguments or {}).decode()
        name = function["name"]
        calls.append(
            {"id": str(call.get("id") or f"call_{at}"), "type": "function", "function": {"name": name, "arguments": text}}
        )
    return calls


def _usage(found: Any) -> Usage:
    """OpenAI's `usage`, with what DeepSeek (prompt_cache_hit_tokens), OpenRouter (cache_write_tokens), xAI and Gemini
    (reasoning beside the completion) make of it."""
    if not isinstance(found, dict):
        return Usage(known=False)
    into, out_of = (_details(found.get(f"{name}_tokens_details")) for name in ("prompt", "completion"))
    cached = into.get("cached_tokens", found.get("prompt_cache_hit_tokens"))
    read, written, reasoning = (
        count(value)
        for value in (found.get("prompt_tokens"), found.get("completion_tokens"), out_of.get("reasoning_tokens"))
    )
    # Some do not count reasoning among the completion: the total tells. Others do, and their total is the plain sum.
    beside = count(found.get("total_tokens")) - read - written
    if read and beside > 0 and beside == (reasoning or beside):
        written, reasoning = written + beside, beside
    return Usage(
        read, count(cached), written, count(into.get("cache_write_tokens")), reasoning,
        known=is_count(found.get("prompt_tokens")) and is_count(found.get("completion_tokens")),
    )  # fmt: skip


def _details(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def is_count(value: Any) -> bool:
    """Whether a provider told a number of tokens."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**62


def count(value: Any) -> int:
    """A number of tokens; 0 for what is none."""
    return int(value) if is_count(value) else 0


def bad_response(what: str, payload: Any) -> EngineError:
    """An answer with status 200 that is none; asked again."""
    return EngineError("bad_response", f"{what}: {str(payload)[:200]}", status=200, retryable=True)
