"""The wire of Amazon Bedrock's Converse API, as boto3 takes and gives it (images and documents as bytes).

https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from engines.errors import EngineError, invalid
from engines.media import image_of
from engines.params import json_schema_of
from engines.remote.anthropic_messages import _call_id, call_of, split
from engines.remote.openai_chat import bad_response, count, is_count
from engines.remote.provider import Provider, put
from engines.types import Choice, Completion, FinishReason, Message, Request, ToolCall, answer
from engines.usage import Usage

_PLAIN = {"max_tokens": "inferenceConfig.maxTokens", "temperature": "inferenceConfig.temperature",
          "top_p": "inferenceConfig.topP", "stop": "inferenceConfig.stopSequences",
          "top_k": "additionalModelRequestFields.top_k"}  # fmt: skip
_FINISH: dict[str, FinishReason] = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "content_filtered": "content_filter",
    "guardrail_intervened": "content_filter",
}
_CACHE = {"cachePoint": {"type": "default"}}


def body(request: Request, model: str | None, provider: Provider) -> dict[str, Any]:
    """The keywords of boto3's `converse`. Raises `EngineError("invalid_input")` for what cannot be said on this wire."""
    system, turns = split(request.messages, _blocks)
    if not turns:
        raise invalid("a conversation needs a message that is not a system prompt")
    out: dict[str, Any] = {"modelId": model, "messages": turns}
    if system:
        out["system"] = system
    generation = request.generation
    for name, path in _PLAIN.items():
        value = getattr(generation, name)
        if value is not None:
            put(out, provider.rename.get(name, path), value)
    if generation.reasoning_effort is not None:
        provider.place(out, "reasoning_effort", generation.reasoning_effort)
    if generation.tools and generation.tool_choice != "none":
        out["toolConfig"] = {"tools": [_tool(tool) for tool in generation.tools]}
        if (choice := _tool_choice(generation.tool_choice)) is not None:
            out["toolConfig"]["toolChoice"] = choice
    if generation.response_format is not None:
        schema = json_schema_of(generation.response_format)
        structure = {"jsonSchema": {"schema": orjson.dumps(schema).decode(), "name": "answer"}}
        out["outputConfig"] = {"textFormat": {"type": "json_schema", "structure": structure}}
    if provider.prompt_caching and system:
        system.append(_CACHE)
    return out


def _blocks(message: Message) -> list[dict[str, Any]]:
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    blocks = [_block(part) for part in parts if part["type"] != "text" or part["text"]]
    if message["role"] == "tool":
        result = {"toolUseId": _call_id(message), "content": blocks or [{"text": " "}]}
        return [{"toolResult": result}]
    for call in message.get("tool_calls") or ():
        name, arguments = call_of(call)
        blocks.append({"toolUse": {"toolUseId": call["id"], "name": name, "input": arguments}})
    return blocks


def _block(part: Any) -> dict[str, Any]:
    if part["type"] == "text":
        return {"text": part["text"]}
    if part["type"] == "image_url":
        image = image_of(part)
        if image.url:
            raise invalid("Bedrock takes images as files or data URLs, not as web addresses")
        return {"image": {"format": image.media_type.removeprefix("image/"), "source": {"bytes": image.data}}}
    raise invalid(f"content of type '{part['type']}' cannot be sent to this provider")


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, Mapping):
        return dict(tool)
    spec: dict[str, Any] = {"name": function.get("name")}
    if function.get("description"):
        spec["description"] = function["description"]
    spec["inputSchema"] = {"json": function.get("parameters") or {"type": "object", "properties": {}}}
    return {"toolSpec": spec}


def _tool_choice(choice: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if choice in (None, "none"):
        return None
    if isinstance(choice, dict):
        function = choice.get("function")
        return {"tool": {"name": function.get("name")}} if isinstance(function, Mapping) else choice
    if choice in ("auto", "required"):
        return {"auto": {}} if choice == "auto" else {"any": {}}
    raise invalid(f"tool_choice must be auto, none, required or one tool, not {choice!r}")


def completion(payload: dict[str, Any], _: Provider) -> Completion:
    """A whole answer, read leniently. Raises `EngineError` where there is none in it, with the usage that is paid."""
    usage = _usage(payload.get("usage"))
    try:
        return _completion(payload, usage)
    except EngineError as error:
        error.usage = usage
        raise


def _usage(found: Any) -> Usage:
    """`inputTokens` leaves out what was read from the prompt cache and what was written to it."""
    if not isinstance(found, dict):
        return Usage(known=False)
    cached, write = count(found.get("cacheReadInputTokens")), count(found.get("cacheWriteInputTokens"))
    details = found.get("cacheDetails")
    parts = [part for part in details if isinstance(part, dict)] if isinstance(details, list) else []
    return Usage(
        count(found.get("inputTokens")) + cached + write, cached, count(found.get("outputTokens")), write,
        cache_write_1h=sum(count(part.get("inputTokens")) for part in parts if part.get("ttl") == "1h"),
        known=is_count(found.get("inputTokens")) and is_count(found.get("outputTokens")),
    )  # fmt: skip


def _completion(payload: dict[str, Any], usage: Usage) -> Completion:
    output = payload.get("output")
    message = output.get("message") if isinstance(output, dict) else None
    blocks = message.get("content") if isinstance(message, dict) else None
    if not isinstance(blocks, list):
        raise bad_response("the answer has no message", payload)
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for block in blocks:
        if not isinstance(block, dict):
            continue
        use, thought = block.get("toolUse"), block.get("reasoningContent")
        if isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif isinstance(use, dict):
            function = {"name": str(use.get("name")), "arguments": orjson.dumps(use.get("input") or {}).decode()}
            calls.append({"id": str(use.get("toolUseId")), "type": "function", "function": function})  # type: ignore[typeddict-item]
        elif isinstance(thought, dict) and isinstance(inner := thought.get("reasoningText"), dict):
            thoughts.append(str(inner.get("text") or ""))
    reason = payload.get("stopReason")
    if _FINISH.get(str(reason)) == "content_filter" and not texts:
        raise EngineError("content_filter", f"Bedrock withheld the answer ({reason})")
    if reason is None and not blocks:
        raise bad_response("the answer is empty", payload)
    return Completion(
        [Choice(answer("".join(texts) if texts else None, calls), _FINISH.get(str(reason), "stop"))],
        usage,
        reasoning="\n".join(thoughts) or None,
    )
