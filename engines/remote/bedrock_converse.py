"""The wire format of Amazon Bedrock's Converse API, in boto3's form: images, audio and documents are bytes.

https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from engines.errors import invalid
from engines.params import json_schema_of
from engines.remote.content import (
    AudioBlock,
    Block,
    DocumentBlock,
    ImageBlock,
    TextBlock,
    ThinkingBlock,
    ToolResult,
    ToolUse,
    cannot_send,
    split_system,
    tool_call,
)
from engines.remote.provider import Provider, put
from engines.remote.schemas import provider_schema
from engines.remote.wire_format import (
    Ending,
    bad_response,
    complete,
    count,
    finish_reason,
    is_count,
    with_thinking,
)
from engines.types import Choice, Completion, Request, ToolCall, answer
from engines.usage import Usage

STREAM: dict[str, Any] = {}
ROW_FIELDS: frozenset[str] | None = frozenset(
    ("additionalModelRequestFields", "additionalModelResponseFieldPaths", "guardrailConfig", "performanceConfig",
     "projectIdentifier", "promptVariables", "requestMetadata", "serviceTier")
)  # fmt: skip
FINISH_REASONS: dict[str, Ending] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "content_filtered": "content_filter",
    "guardrail_intervened": "content_filter",
    "malformed_model_output": "bad_response",
    "malformed_tool_use": "bad_response",
}
_PLAIN = {"max_tokens": "inferenceConfig.maxTokens", "temperature": "inferenceConfig.temperature",
          "top_p": "inferenceConfig.topP", "stop": "inferenceConfig.stopSequences",
          "top_k": "additionalModelRequestFields.top_k"}  # fmt: skip
_CACHE = {"cachePoint": {"type": "default"}}
_DOCUMENT_FORMATS = {
    "application/pdf": "pdf",
    "text/plain": "txt",
    "text/csv": "csv",
    "text/html": "html",
    "text/markdown": "md",
    "application/msword": "doc",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "application/vnd.ms-excel": "xls",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
}


def body(request: Request, model: str | None, provider: Provider) -> dict[str, Any]:
    """The keywords of boto3's `converse`. Raises `EngineError("invalid_input")` for what this API cannot take."""
    system, turns = split_system(request.messages, _render)
    out: dict[str, Any] = {"modelId": model, "messages": turns}
    if system:
        out["system"] = system
    generation = request.generation
    for name, path in _PLAIN.items():
        value = getattr(generation, name)
        if value is not None:
            put(out, provider.rename.get(name, path), value)
    if (effort := generation.reasoning_effort) is not None:
        provider.place(out, "reasoning_effort", effort)
        if reasoning := out.get("additionalModelRequestFields", {}).get("reasoningConfig"):  # Nova
            out["additionalModelRequestFields"]["reasoningConfig"] = (
                {"type": "disabled"} if effort == "none" else {"type": "enabled", **reasoning}
            )
    tools = [_tool(tool, provider) for tool in generation.tools or ()]
    used = _used_tools(turns)  # the API refuses calls of tools in a conversation without a toolConfig
    if used or (tools and generation.tool_choice != "none"):
        out["toolConfig"] = {"tools": tools or used}
        if tools and (choice := _tool_choice(generation.tool_choice)) is not None:
            out["toolConfig"]["toolChoice"] = choice
    if generation.response_format is not None:
        schema = provider_schema(json_schema_of(generation.response_format), provider.schemas, provider.inline_refs)
        structure = {"jsonSchema": {"schema": orjson.dumps(schema).decode(), "name": "answer"}}
        put(out, "outputConfig.textFormat", {"type": "json_schema", "structure": structure})
    if provider.prompt_caching and system:
        system.append(_CACHE)
    return out


def _render(block: Block) -> Iterator[dict[str, Any]]:
    match block:
        case TextBlock(text=text):
            yield {"text": text}
        case ImageBlock(image=image):
            if image.url:
                raise invalid("Bedrock takes images as files or data URLs, not as web addresses")
            yield {"image": {"format": image.media_type.removeprefix("image/"), "source": {"bytes": image.data}}}
        case AudioBlock(format=format):
            yield {"audio": {"format": format, "source": {"bytes": block.data()}}}
        case DocumentBlock(media_type=media_type):
            if media_type not in _DOCUMENT_FORMATS:
                raise invalid(f"Bedrock takes no documents of type {media_type}")
            # The characters that the API takes in a name.
            name = " ".join(re.sub(r"[^A-Za-z0-9 ()\[\]-]", " ", block.name).split())[:200] or "document"
            yield {"document": {"format": _DOCUMENT_FORMATS[media_type], "name": name, "source": {"bytes": block.data()}}}
        case ThinkingBlock(redacted=redacted) if redacted:
            yield {"reasoningContent": {"redactedContent": _bytes(redacted)}}
        case ThinkingBlock(text=text, signature=signature):
            signed = {"signature": signature} if signature else {}
            yield {"reasoningContent": {"reasoningText": {"text": text, **signed}}}
        case ToolUse(id=id, name=name, arguments=arguments):
            yield {"toolUse": {"toolUseId": id, "name": name, "input": arguments}}
        case ToolResult(call_id=id, content=content):
            inner = [found for each in content for found in _render(each)]
            yield {"toolResult": {"toolUseId": id, "content": inner or [{"text": " "}]}}
        case _:
            raise cannot_send(block)


def _used_tools(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Declarations of the tools that the conversation called, with any arguments."""
    names = (block["toolUse"]["name"] for turn in turns for block in turn["content"] if "toolUse" in block)
    return [{"toolSpec": {"name": name, "inputSchema": {"json": {"type": "object"}}}} for name in dict.fromkeys(names)]


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise invalid("the data of a redacted_thinking block is not valid base64") from None


def _tool(tool: Mapping[str, Any], provider: Provider) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, Mapping):
        return dict(tool)
    spec: dict[str, Any] = {"name": function.get("name")}
    if function.get("description"):
        spec["description"] = function["description"]
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    if function.get("strict"):
        spec["strict"] = True
        schema = provider_schema(schema, provider.schemas, provider.inline_refs)
    spec["inputSchema"] = {"json": schema}
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


def usage(payload: dict[str, Any]) -> Usage:
    """The token counts of an answer. `inputTokens` leaves out what was read from and written to the prompt cache."""
    found = payload.get("usage")
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


def completion(payload: dict[str, Any], provider: Provider) -> Completion:
    """Reads an answer. Raises `EngineError`."""
    output = payload.get("output")
    message = output.get("message") if isinstance(output, dict) else None
    blocks = message.get("content") if isinstance(message, dict) else None
    if not isinstance(blocks, list):
        raise bad_response("the answer has no message", payload)
    texts: list[str] = []
    thinking: list[dict[str, Any]] = []
    calls: list[ToolCall] = []
    for block in blocks:
        if not isinstance(block, dict):
            continue
        use, thought = block.get("toolUse"), block.get("reasoningContent")
        if isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif isinstance(use, dict):
            calls.append(tool_call(use.get("toolUseId"), use.get("name"), use.get("input")))
        elif isinstance(thought, dict):
            thinking += _thinking(thought)
    finish = finish_reason(payload.get("stopReason"), FINISH_REASONS, provider)
    said = with_thinking(answer("".join(texts) if texts else None, calls), thinking)
    reasoning = "\n".join(block["thinking"] for block in thinking if block.get("thinking"))
    return complete([Choice(said, finish)], usage(payload), None, reasoning or None)


def _thinking(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A block of reasoning in Anthropic's form, which `thinking_blocks` has for both wires."""
    if isinstance(inner := found.get("reasoningText"), dict):
        yield {"type": "thinking", "thinking": str(inner.get("text") or ""), "signature": str(inner.get("signature") or "")}
    elif isinstance(data := found.get("redactedContent"), bytes):
        yield {"type": "redacted_thinking", "data": base64.b64encode(data).decode()}


def accumulator() -> None:
    """None: this format does not stream."""
    return None
