"""The domain: what goes into an engine and what comes out.

Messages are plain JSON-shaped dicts in the OpenAI chat form (typed here as `TypedDict`s), so that a conversation
keeps every field its author wrote, known to us or not. Everything Eagleray itself fills in is a dataclass.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NotRequired, Required, TypedDict

from engines.errors import Failure, invalid, nearest
from engines.params import GenerationParams
from engines.usage import Usage

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES = frozenset(("system", "developer", "user", "assistant", "tool"))

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


# Local engines must bound an answer; used where the caller names no `max_tokens`.
DEFAULT_MAX_TOKENS = 1024
# Bytes of a request's body for each token of input, before the provider has told better.
BYTES_PER_TOKEN = 4.0
# Output tokens to reserve for a request without `max_tokens`, until the first answer shows a typical length.
FIRST_OUTPUT = 512.0
# How often an answer that is not in the shape asked for is asked for again, where the caller does not say.
DEFAULT_SCHEMA_RETRIES = 2


class Function(TypedDict):
    name: str
    arguments: str  # JSON text, as the model wrote it


class ToolCall(TypedDict, total=False):
    id: Required[str]
    type: Required[Literal["function"]]
    function: Required[Function]


class ContentPart(TypedDict, total=False):
    type: Required[str]  # "text", "image_url", …
    text: str
    image_url: dict[str, Any]


class Message(TypedDict, total=False):
    role: Required[Role]
    content: Required[str | list[ContentPart] | None]
    name: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]


@dataclass(slots=True)
class Conversation:
    """Messages to be answered, with what is particular to them: an id, overrides of generation, model and adapter."""

    messages: list[Message]
    id: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    adapter: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    turns: list[Any] = field(default_factory=list)  # what the user says next, each after the answer to the one before


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer as it is made: text, or the reasoning before it, of the choice `index`."""

    text: str = ""
    reasoning: str = ""
    index: int = 0


class Stream:
    """Takes the pieces of one answer, from any thread. Once it has `begun`, nothing may be asked anew: its reader has seen
    them."""

    def __init__(self, pieces: asyncio.Queue[Delta | None]) -> None:
        self.loop, self.pieces = asyncio.get_running_loop(), pieces
        self.begun = False

    def put(self, delta: Delta) -> None:
        self.begun = True
        with contextlib.suppress(RuntimeError):  # its loop has ended, and whoever read here with it
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, delta)


@dataclass(frozen=True, slots=True)
class Request:
    """One effective request: a conversation with all its parameters settled. `key` names it for logs and ledgers."""

    messages: list[Message]
    generation: GenerationParams = GenerationParams()
    model: str | None = None  # None: the engine's own
    adapter: str | None = None
    key: str = ""
    turns: list[Any] = field(default_factory=list)  # contents of further user messages; see `Conversation`
    stream: Stream | None = None  # where an engine that can puts text as it comes; set by `Engine.stream`


@dataclass(slots=True)
class Choice:
    """One sampled answer. `logprobs` holds one entry per generated token, in OpenAI's `logprobs.content` form."""

    message: Message
    finish_reason: FinishReason
    logprobs: list[dict[str, Any]] | None = None


@dataclass(slots=True)
class Completion:
    """What came back for one request: its choices, or an error, never both.

    `message`, `text`, `finish_reason` and `logprobs` are those of the first choice.
    """

    choices: list[Choice] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    model: str | None = None
    engine: str | None = None
    attempts: int = 1
    latency_s: float = 0.0
    reasoning: str | None = None
    error: Failure | None = None
    cost_usd: float | None = 0.0  # US$ for all tries; None: not known. Set by the engine that answered.
    dialogue: list[Message] = field(default_factory=list)  # between a request's messages and the last of its answers

    def accumulate(self, before: Completion) -> None:
        """Adds what `before`, asked for the same row, has taken. A cost that is not known makes the sum unknown."""
        self.usage.add(before.usage)
        known = self.cost_usd is not None and before.cost_usd is not None
        self.cost_usd = self.cost_usd + before.cost_usd if known else None  # type: ignore[operator]
        self.attempts += before.attempts
        self.latency_s += before.latency_s

    @property
    def message(self) -> Message | None:
        return self.choices[0].message if self.choices else None

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason if self.choices else None

    @property
    def logprobs(self) -> list[dict[str, Any]] | None:
        return self.choices[0].logprobs if self.choices else None

    @property
    def tool_calls(self) -> list[ToolCall] | None:
        return self.choices[0].message.get("tool_calls") if self.choices else None

    @property
    def text(self) -> str | None:
        return text_of(self.choices[0].message) if self.choices else None


def text_of(message: Message) -> str | None:
    """A message's text, its text parts joined; None where it has none (a bare tool call, say)."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content
    texts = [part["text"] for part in content if part.get("type") == "text"]
    return "".join(texts) if texts else None


def answer(text: str | None, tool_calls: list[ToolCall] | None = None) -> Message:
    """An assistant message."""
    message: Message = {"role": "assistant", "content": text}
    if tool_calls:
        message["tool_calls"] = tool_calls
    return message


def check_messages(messages: Any) -> list[Message]:
    """`messages` itself when it is a conversation an engine can answer; raises `EngineError("invalid_input")` if not."""
    if not isinstance(messages, list):
        raise invalid(f"messages must be a list, not {type(messages).__name__}")
    if not messages:
        raise invalid("messages is empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise invalid(f"messages[{i}] must be an object, not {type(message).__name__}")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            hint = nearest(role, ROLES) if isinstance(role, str) else ""
            raise invalid(f"messages[{i}] has the unknown role {role!r:.60}{hint}")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                    raise invalid(f"messages[{i}].content has a part without a 'type'")
                if part["type"] == "text" and not isinstance(part.get("text"), str):
                    raise invalid(f"messages[{i}].content has a text part without 'text'")
        elif content is not None or (role != "assistant"):
            raise invalid(f"messages[{i}].content must be text or a list of parts, not {type(content).__name__}")
        elif not message.get("tool_calls"):
            raise invalid(f"messages[{i}] has neither content nor tool_calls")
    return messages


_CONVERSATION_KEYS = frozenset(f.name for f in fields(Conversation))


def to_request(conversation: Conversation | Mapping[str, Any], base: GenerationParams) -> Request:
    """A conversation with its own overrides laid over `base`. Raises `EngineError("invalid_input")`."""
    if isinstance(conversation, Mapping):
        if "messages" not in conversation:
            raise invalid(f"a conversation needs 'messages'; this one has {', '.join(map(str, conversation)) or 'nothing'}")
        conversation = Conversation(**{k: v for k, v in conversation.items() if k in _CONVERSATION_KEYS})
    if not isinstance(conversation, Conversation):
        raise invalid(f"a conversation is a Conversation or a mapping, not {type(conversation).__name__}")
    if conversation.generation and not isinstance(conversation.generation, Mapping):
        raise invalid(f"generation must be a mapping of parameters, not {conversation.generation!r:.60}")
    if not isinstance(conversation.turns, list):
        raise invalid(f"turns must be a list of what the user says, not {conversation.turns!r:.60}")
    return Request(
        messages=check_messages(conversation.messages),
        generation=base.override(conversation.generation or {}),
        model=conversation.model,
        adapter=conversation.adapter,
        key=conversation.id or "",
        turns=conversation.turns,
    )
