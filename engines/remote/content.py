"""The content of a message as typed blocks. Every wire format builds its requests from these.

Content comes in OpenAI's form (text, image_url, input_audio, file) or in Anthropic's (document, thinking, …). A block
keeps the `part` it was read from. A part that already has the form of the API is sent unchanged.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from engines.errors import EngineError, invalid
from engines.media import Image, image_of
from engines.types import Message, ToolCall, plain_message


@dataclass(frozen=True, slots=True)
class Block:
    """A part of content that has no type of its own here."""

    part: Mapping[str, Any]

    @property
    def type(self) -> str:
        return str(self.part["type"])

    @property
    def cache_control(self) -> dict[str, Any]:
        """The author's mark for Anthropic's prompt cache, if there is one."""
        return {"cache_control": found} if (found := self.part.get("cache_control")) else {}


@dataclass(frozen=True, slots=True)
class TextBlock(Block):
    text: str


@dataclass(frozen=True, slots=True)
class ImageBlock(Block):
    image: Image


@dataclass(frozen=True, slots=True)
class AudioBlock(Block):
    base64: str
    format: str  # "wav", "mp3", …

    def data(self) -> bytes:
        return _decoded(self.base64, self.type)


@dataclass(frozen=True, slots=True)
class DocumentBlock(Block):
    base64: str
    media_type: str  # "application/pdf", "text/plain", …
    name: str

    def data(self) -> bytes:
        return _decoded(self.base64, self.type)


@dataclass(frozen=True, slots=True)
class ThinkingBlock(Block):
    """A model's reasoning, which the provider signed; or `redacted`, which only the provider can read (base64)."""

    text: str = ""
    signature: str = ""
    redacted: str = ""


@dataclass(frozen=True, slots=True)
class ToolUse(Block):
    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolResult(Block):
    """The result of a tool. `part["content"]` is the content as its author wrote it."""

    call_id: str
    content: list[Block] = field(default_factory=list)


def blocks_of(message: Message) -> list[Block]:
    """All blocks of a message, its thinking first and its tool calls last. A tool's message is one `ToolResult`.

    Raises `EngineError("invalid_input")` for content that cannot be read. Empty texts, which APIs refuse, are left out.
    """
    content = plain_message(message).get("content")
    parts: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    blocks = [block for block in map(parse, parts) if not (isinstance(block, TextBlock) and not block.text)]
    if message["role"] == "tool":
        return [ToolResult({"type": "tool_result", "content": content}, _call_id(message), blocks)]
    thinking = message.get("thinking_blocks")
    before = [parse(part) for part in thinking if isinstance(part, dict)] if isinstance(thinking, list) else []
    calls = [ToolUse({"type": "tool_use"}, *call_of(call)) for call in message.get("tool_calls") or ()]
    return [*before, *blocks, *calls]


def parse(part: Mapping[str, Any]) -> Block:
    """One part of content. Raises `EngineError("invalid_input")`."""
    reader = _READERS.get(part["type"])
    return reader(part) if reader else Block(part)


def _text(part: Mapping[str, Any]) -> Block:
    return TextBlock(part, part["text"])


def _image(part: Mapping[str, Any]) -> Block:
    return ImageBlock(part, image_of(part))


def _audio(part: Mapping[str, Any]) -> Block:
    audio = part.get("input_audio")
    data, format = (audio.get("data"), audio.get("format")) if isinstance(audio, Mapping) else (None, None)
    if not isinstance(data, str) or not isinstance(format, str):
        raise invalid("an input_audio part needs data (base64) and a format")
    return AudioBlock(part, data, format)


def _file(part: Mapping[str, Any]) -> Block:
    """OpenAI's `file`. One that names an uploaded file by its id belongs to OpenAI and stays as it is."""
    file = part.get("file")
    data = file.get("file_data") if isinstance(file, Mapping) else None
    if not isinstance(data, str) or not isinstance(file, Mapping):
        return Block(part)
    head, comma, body = data.partition(",")
    media_type = head.removeprefix("data:").partition(";")[0] if comma else "application/pdf"
    return DocumentBlock(part, body if comma else data, media_type, str(file.get("filename") or "document"))


def _document(part: Mapping[str, Any]) -> Block:
    """Anthropic's `document`. One from a URL or an uploaded file belongs to Anthropic and stays as it is."""
    source = part.get("source")
    data = source.get("data") if isinstance(source, Mapping) else None
    if not isinstance(source, Mapping) or not isinstance(data, str):
        return Block(part)
    encoded = base64.b64encode(data.encode()).decode() if source.get("type") == "text" else data
    return DocumentBlock(part, encoded, str(source.get("media_type") or "text/plain"), str(part.get("title") or "document"))


def _thinking(part: Mapping[str, Any]) -> Block:
    return ThinkingBlock(part, str(part.get("thinking") or ""), str(part.get("signature") or ""))


def _redacted(part: Mapping[str, Any]) -> Block:
    return ThinkingBlock(part, redacted=str(part.get("data") or ""))


_READERS: dict[str, Callable[[Mapping[str, Any]], Block]] = {
    "text": _text,
    "image_url": _image,
    "input_audio": _audio,
    "file": _file,
    "document": _document,
    "thinking": _thinking,
    "redacted_thinking": _redacted,
}


def _decoded(text: str, kind: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"the data of a part of type '{kind}' is not valid base64") from None


def cannot_send(block: Block) -> EngineError:
    """The error of a block that an API has no form for."""
    return invalid(f"content of type '{block.type}' cannot be sent to this provider")


def _call_id(message: Message) -> str:
    found = message.get("tool_call_id")
    if not isinstance(found, str):
        raise invalid("a tool message needs a tool_call_id")
    return found


def call_of(call: ToolCall) -> tuple[str, str, dict[str, Any]]:
    """A call's id, its name and its arguments. Raises `EngineError("invalid_input")` if they are not a JSON object."""
    try:
        function = call["function"]
        arguments = function["arguments"]
        parsed = orjson.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        if isinstance(parsed, dict) and isinstance(call["id"], str):
            return call["id"], function["name"], parsed
    except (KeyError, TypeError, ValueError):
        pass
    raise invalid(f"a tool call needs an id, a name and arguments that are a JSON object: {str(call)[:200]}")


def split_system(
    messages: list[Message], render: Callable[[Block], Iterator[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """System blocks, and turns of `{"role", "content": blocks}`: Anthropic and Bedrock take these apart.

    Neighbours of one role become one turn. Raises `EngineError("invalid_input")` if there is no turn.
    """
    system: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for message in messages:
        found = [rendered for block in blocks_of(message) for rendered in render(block)]
        if message["role"] in ("system", "developer"):
            system += found
            continue
        role = "assistant" if message["role"] == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += found
        elif found:
            turns.append({"role": role, "content": found})
    if not turns:
        raise invalid("a conversation needs a message that is not a system prompt")
    return system, turns


def tool_call(id: Any, name: Any, arguments: Any) -> ToolCall:
    """A call in our form. Arguments given as an object become JSON text."""
    text = arguments if isinstance(arguments, str) else orjson.dumps(arguments or {}).decode()
    return {"id": str(id), "type": "function", "function": {"name": str(name), "arguments": text}}
