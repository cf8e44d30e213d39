"""The wire of Anthropic's Messages API. https://docs.anthropic.com/en/api/messages"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from engines.errors import EngineError, invalid
from engines.media import image_of
from engines.params import json_schema_of
from engines.remote.openai_chat import bad_response, count, inlined, is_count
from engines.remote.provider import Provider, put
from engines.types import Choice, Completion, Delta, FinishReason, Message, Request, ToolCall, answer
from engines.usage import Usage

_PLAIN = {"max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k",
          "stop": "stop_sequences", "reasoning_effort": "output_config.effort"}  # fmt: skip
STREAM: dict[str, Any] = {"stream": True}
_CACHE = {"type": "ephemeral"}
_FINISH: dict[str, FinishReason] = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


def body(request: Request, model: str | None, provider: Provider) -> dict[str, Any]:
    """The request's JSON. Raises `EngineError("invalid_input")` for what cannot be said on this wire.

    System prompts, wherever they stand, are joined in the field of their own; neighbours of one role become one message.
    """
    system, turns = split(request.messages, _blocks)
    if not turns:
        raise invalid("a conversation needs a message that is not a system prompt")
    out: dict[str, Any] = {"model": model, "messages": turns}
    if system:
        out["system"] = system
    for name, path in _PLAIN.items():
        value = getattr(request.generation, name)
        if value is not None:
            put(out, provider.rename.get(name, path), value)
    if request.generation.tools:
        out["tools"] = [_tool(tool) for tool in request.generation.tools]
    if request.generation.tool_choice is not None:
        out["tool_choice"] = _tool_choice(request.generation.tool_choice)
    if request.generation.response_format is not None:
        schema = json_schema_of(request.generation.response_format)
        put(out, "output_config.format", {"type": "json_schema", "schema": inlined(schema)})
    if provider.prompt_caching:  # the stable part (tools, then system), and the conversation up to its end
        if system:
            system[-1].setdefault("cache_control", _CACHE)
        elif out.get("tools"):
            out["tools"][-1] = {**out["tools"][-1], "cache_control": _CACHE}
    return out


def split(messages: list[Message], blocks: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """System blocks, and turns of `{"role", "content": blocks}` in which no two neighbours have one role."""
    system: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for message in messages:
        found = blocks(message)
        if message["role"] in ("system", "developer"):
            system += found
            continue
        role = "assistant" if message["role"] == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += found
        elif found:
            turns.append({"role": role, "content": found})
    return system, turns


def _blocks(message: Message) -> list[dict[str, Any]]:
    content = message.get("content")
    if message["role"] == "tool":
        inner: Any = content if isinstance(content, str) else _parts(content or [])
        return [{"type": "tool_result", "tool_use_id": _call_id(message), "content": inner}]
    blocks = _parts([{"type": "text", "text": content}] if isinstance(content, str) else content or [])
    for call in message.get("tool_calls") or ():
        name, arguments = call_of(call)
        blocks.append({"type": "tool_use", "id": call["id"], "name": name, "input": arguments})
    return blocks


def _call_id(message: Message) -> str:
    found = message.get("tool_call_id")
    if not isinstance(found, str):
        raise invalid("a tool message needs a tool_call_id")
    return found


def call_of(call: ToolCall) -> tuple[str, dict[str, Any]]:
    """A call's name and its arguments as an object. Raises `EngineError("invalid_input")` where they are not JSON."""
    try:
        function = call["function"]
        arguments = function["arguments"]
        parsed = orjson.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        if isinstance(parsed, dict) and isinstance(call["id"], str):
            return function["name"], parsed
    except (KeyError, TypeError, ValueError):
        pass
    raise invalid(f"a tool call needs an id, a name and arguments that are a JSON object: {str(call)[:200]}")


def _parts(parts: list[Any]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for part in parts:
        cache = {"cache_control": part["cache_control"]} if part.get("cache_control") else {}
        if part["type"] == "text":
            if part["text"]:  # the API refuses empty ones
                out.append({"type": "text", "text": part["text"], **cache})
        elif part["type"] == "image_url":
            image = image_of(part)
            source = {"type": "url", "url": image.url} if image.url else {
                "type": "base64", "media_type": image.media_type, "data": image.base64()}  # fmt: skip
            out.append({"type": "image", "source": source, **cache})
        elif part["type"] in ("image", "document", "thinking", "redacted_thinking", "search_result"):
            out.append(dict(part))  # in this wire's own form already
        else:
            raise invalid(f"content of type '{part['type']}' cannot be sent to this provider")
    return out


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        return dict(tool)  # in this wire's own form already, or one of the provider's own tools
    found: dict[str, Any] = {"name": function.get("name")}
    if function.get("description"):
        found["description"] = function["description"]
    found["input_schema"] = function.get("parameters") or {"type": "object", "properties": {}}
    if function.get("strict"):
        found["strict"] = True
    return found


def _tool_choice(choice: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(choice, str):
        kind = {"auto": "auto", "none": "none", "required": "any"}.get(choice)
        if kind is None:
            raise invalid(f"tool_choice must be auto, none, required or one tool, not {choice!r}")
        return {"type": kind}
    function = choice.get("function")
    return {"type": "tool", "name": function.get("name")} if isinstance(function, Mapping) else dict(choice)


def completion(payload: dict[str, Any], _: Provider) -> Completion:
    """A whole answer, read leniently; one that is thinking alone is an answer too. Raises `EngineError` for none, with the
    usage that is paid."""
    usage = _usage(payload.get("usage"))
    try:
        return _completion(payload, usage)
    except EngineError as error:
        error.usage = usage
        raise


def _usage(found: Any) -> Usage:
    """`input_tokens` leaves out what was read from the prompt cache and what was written to it."""
    if not isinstance(found, dict):
        return Usage(known=False)
    cached, write = count(found.get("cache_read_input_tokens")), count(found.get("cache_creation_input_tokens"))
    by_time = found.get("cache_creation")
    hour = count(by_time.get("ephemeral_1h_input_tokens")) if isinstance(by_time, dict) else 0
    return Usage(
        count(found.get("input_tokens")) + cached + write, cached, count(found.get("output_tokens")), write,
        cache_write_1h=hour, known=is_count(found.get("input_tokens")) and is_count(found.get("output_tokens")),
    )  # fmt: skip


def _completion(payload: dict[str, Any], usage: Usage) -> Completion:
    blocks = payload.get("content")
    if not isinstance(blocks, list):
        raise bad_response("the answer has no content", payload)
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(str(block.get("text") or ""))
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "tool_use":
            arguments = orjson.dumps(block.get("input") or {}).decode()
            function = {"name": str(block.get("name")), "arguments": arguments}
            calls.append({"id": str(block.get("id")), "type": "function", "function": function})  # type: ignore[typeddict-item]
    reason = payload.get("stop_reason")
    if reason is None and not blocks:
        raise bad_response("the answer is empty", payload)
    if reason == "refusal" and not texts:
        raise EngineError("content_filter", "the model refused to answer")
    model = payload.get("model")
    return Completion(
        [Choice(answer("".join(texts) if texts else None, calls), _FINISH.get(str(reason), "stop"))],
        usage,
        model if isinstance(model, str) else None,
        reasoning="\n".join(thoughts) or None,
    )


class MessagesAccumulator:
    """A streamed answer's events, joined to what a plain answer is (see `engines.remote.sse`)."""

    def __init__(self) -> None:
        self.whole: dict[str, Any] = {"content": [], "usage": {}, "stop_reason": None}

    @property
    def finished(self) -> bool:
        return self.whole["stop_reason"] is not None

    def add(self, event: dict[str, Any]) -> Iterator[Delta]:
        kind, blocks = event.get("type"), self.whole["content"]
        if kind == "message_start":
            message = event["message"]
            self.whole.update(model=message.get("model"), usage=message.get("usage") or {})
        elif kind == "content_block_start":
            blocks.append({"text": "", "thinking": "", "json": "", **event["content_block"]})
        elif kind == "content_block_delta" and blocks:
            delta = event["delta"]
            text, thought = str(delta.get("text") or ""), str(delta.get("thinking") or "")
            blocks[-1]["text"] += text
            blocks[-1]["thinking"] += thought
            blocks[-1]["json"] += delta.get("partial_json") or ""
            if text or thought:
                yield Delta(text, thought)
        elif kind == "content_block_stop" and blocks and blocks[-1]["json"]:
            blocks[-1]["input"] = orjson.loads(blocks[-1]["json"])
        elif kind == "message_delta":
            self.whole["stop_reason"] = event["delta"].get("stop_reason")
            self.whole["usage"] |= event.get("usage") or {}

    def payload(self) -> dict[str, Any]:
        return self.whole
