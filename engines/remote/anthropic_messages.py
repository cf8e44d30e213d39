"""The wire format of Anthropic's Messages API. https://docs.anthropic.com/en/api/messages"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from engines.errors import invalid
from engines.params import json_schema_of
from engines.remote.content import (
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
from engines.types import Choice, Completion, Delta, Request, ToolCall, answer
from engines.usage import Usage

STREAM: dict[str, Any] = {"stream": True}
ROW_FIELDS: frozenset[str] | None = frozenset(
    ("cache_control", "container", "diagnostics", "inference_geo", "metadata", "output_config", "service_tier", "speed",
     "thinking", "user_profile_id")
)  # fmt: skip
# `pause_turn` and `compaction`: the API stopped at a limit of its own, before the answer was whole.
FINISH_REASONS: dict[str, Ending] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "pause_turn": "length",
    "compaction": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_PLAIN = {"max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k",
          "stop": "stop_sequences", "reasoning_effort": "output_config.effort"}  # fmt: skip
_CACHE = {"type": "ephemeral"}
# Types of content that are already in this API's own form.
_NATIVE = frozenset(("image", "document", "search_result"))


def body(request: Request, model: str | None, provider: Provider) -> dict[str, Any]:
    """The body of a request. Raises `EngineError("invalid_input")` for what this API cannot take.

    All system prompts, at any position, go into the field `system`. Neighbouring messages of one role become one message.
    """
    system, turns = split_system(request.messages, _render)
    out: dict[str, Any] = {"model": model, "messages": turns}
    if system:
        out["system"] = system
    for name, path in _PLAIN.items():
        value = getattr(request.generation, name)
        if value is not None:
            put(out, provider.rename.get(name, path), value)
    if request.generation.tools:
        out["tools"] = [_tool(tool, provider) for tool in request.generation.tools]
    if request.generation.tool_choice is not None:
        out["tool_choice"] = _tool_choice(request.generation.tool_choice)
    if request.generation.response_format is not None:
        schema = json_schema_of(request.generation.response_format)
        taken = provider_schema(schema, provider.schemas, provider.inline_refs)
        put(out, "output_config.format", {"type": "json_schema", "schema": taken})
    if provider.prompt_caching and not _is_marked(out):
        # The end of what rows share: the tools, then the system prompt.
        if system:
            system[-1]["cache_control"] = _CACHE
        elif out.get("tools"):
            out["tools"][-1] = {**out["tools"][-1], "cache_control": _CACHE}
    return out


def _is_marked(body: dict[str, Any]) -> bool:
    """True if the row has marks of its own for the cache. There may be four, and one of an hour may not follow ours."""
    blocks = [*body.get("system", ()), *body.get("tools", ())]
    for turn in body["messages"]:
        blocks += turn["content"]
    return any("cache_control" in block for block in blocks)


def _render(block: Block) -> Iterator[dict[str, Any]]:
    cache = block.cache_control
    match block:
        case TextBlock(text=text):
            yield {"type": "text", "text": text, **cache}
        case ImageBlock(image=image):
            source = {"type": "url", "url": image.url} if image.url else {
                "type": "base64", "media_type": image.media_type, "data": image.base64()}  # fmt: skip
            yield {"type": "image", "source": source, **cache}
        case DocumentBlock() if block.type == "file":
            yield {"type": "document", "source": _document_source(block), "title": block.name, **cache}
        case ThinkingBlock():
            yield dict(block.part)
        case ToolUse(id=id, name=name, arguments=arguments):
            yield {"type": "tool_use", "id": id, "name": name, "input": arguments}
        case ToolResult(call_id=id, content=content):
            said = block.part["content"]
            inner = said if isinstance(said, str) else [found for each in content for found in _render(each)]
            yield {"type": "tool_result", "tool_use_id": id, "content": inner}
        case _ if block.type in _NATIVE:
            yield dict(block.part)
        case _:
            raise cannot_send(block)


def _document_source(block: DocumentBlock) -> dict[str, Any]:
    if block.media_type == "application/pdf":
        return {"type": "base64", "media_type": "application/pdf", "data": block.base64}
    if block.media_type.startswith("text/"):
        return {"type": "text", "media_type": "text/plain", "data": block.data().decode("utf-8", "replace")}
    raise invalid(f"this provider takes PDF and text documents, not {block.media_type}")


def _tool(tool: Mapping[str, Any], provider: Provider) -> dict[str, Any]:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        return dict(tool)  # in Anthropic's own form already
    found: dict[str, Any] = {"name": function.get("name")}
    if function.get("description"):
        found["description"] = function["description"]
    found["input_schema"] = function.get("parameters") or {"type": "object", "properties": {}}
    if function.get("strict"):
        found["strict"] = True
        found["input_schema"] = provider_schema(found["input_schema"], provider.schemas, provider.inline_refs)
    return found


def _tool_choice(choice: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(choice, str):
        kind = {"auto": "auto", "none": "none", "required": "any"}.get(choice)
        if kind is None:
            raise invalid(f"tool_choice must be auto, none, required or one tool, not {choice!r}")
        return {"type": kind}
    function = choice.get("function")
    return {"type": "tool", "name": function.get("name")} if isinstance(function, Mapping) else dict(choice)


def usage(payload: dict[str, Any]) -> Usage:
    """The token counts of an answer. `input_tokens` leaves out what was read from and written to the prompt cache."""
    found = payload.get("usage")
    if not isinstance(found, dict):
        return Usage(known=False)
    cached, write = count(found.get("cache_read_input_tokens")), count(found.get("cache_creation_input_tokens"))
    by_time = found.get("cache_creation")
    hour = count(by_time.get("ephemeral_1h_input_tokens")) if isinstance(by_time, dict) else 0
    return Usage(
        count(found.get("input_tokens")) + cached + write, cached, count(found.get("output_tokens")), write,
        cache_write_1h=hour, known=is_count(found.get("input_tokens")) and is_count(found.get("output_tokens")),
    )  # fmt: skip


def completion(payload: dict[str, Any], provider: Provider) -> Completion:
    """Reads an answer; thinking alone is an answer too. Raises `EngineError`."""
    blocks = payload.get("content")
    if not isinstance(blocks, list):
        raise bad_response("the answer has no content", payload)
    texts: list[str] = []
    thinking: list[dict[str, Any]] = []
    calls: list[ToolCall] = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(str(block.get("text") or ""))
        elif kind == "thinking":
            thinking.append({"type": kind, **{name: str(block.get(name) or "") for name in ("thinking", "signature")}})
        elif kind == "redacted_thinking":
            thinking.append({"type": kind, "data": str(block.get("data") or "")})
        elif kind == "tool_use":
            calls.append(tool_call(block.get("id"), block.get("name"), block.get("input")))
    finish = finish_reason(payload.get("stop_reason"), FINISH_REASONS, provider)
    message = with_thinking(answer("".join(texts) if texts else None, calls), thinking)
    reasoning = "\n".join(block["thinking"] for block in thinking if block.get("thinking"))
    return complete([Choice(message, finish)], usage(payload), payload.get("model"), reasoning or None)


def accumulator() -> MessagesAccumulator:
    return MessagesAccumulator()


class MessagesAccumulator:
    """Joins the events of a streamed answer to the payload of one that is not streamed."""

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
            blocks.append({"text": "", "thinking": "", "signature": "", "json": "", **event["content_block"]})
        elif kind == "content_block_delta" and blocks:
            delta = event["delta"]
            text, thought = str(delta.get("text") or ""), str(delta.get("thinking") or "")
            blocks[-1]["text"] += text
            blocks[-1]["thinking"] += thought
            blocks[-1]["signature"] += delta.get("signature") or ""
            blocks[-1]["json"] += delta.get("partial_json") or ""
            if text or thought:
                yield Delta(text, thought)
        elif kind == "content_block_stop" and blocks and blocks[-1]["json"]:
            with contextlib.suppress(ValueError):  # cut off by `max_tokens`: the arguments stay the text they are
                blocks[-1]["input"] = blocks[-1]["json"]
                blocks[-1]["input"] = orjson.loads(blocks[-1]["json"])
        elif kind == "message_delta":
            self.whole["stop_reason"] = event["delta"].get("stop_reason")
            usage = event.get("usage") or {}
            self.whole["usage"] |= {name: value for name, value in usage.items() if value is not None}

    def payload(self) -> dict[str, Any]:
        return self.whole
