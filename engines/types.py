"""The domain: what goes into an engine and what comes out.

Messages are plain JSON-shaped dicts in the OpenAI chat form (typed here as `TypedDict`s), so that a conversation
keeps every field its author wrote, even those that Eagleray does not know. Types that Eagleray fills in are dataclasses.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NotRequired, Required, TypedDict

from engines.errors import Failure, invalid, nearest
from engines.params import GenerationParams
from engines.tasks import CHAT, check_inputs
from engines.usage import Usage

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES = frozenset(("system", "developer", "user", "assistant", "tool"))

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


# The `max_tokens` of local engines if the caller sets none: they must bound an answer.
DEFAULT_MAX_TOKENS = 1024
# Bytes of a request's body for each input token, until the provider's counts show the real ratio.
BYTES_PER_TOKEN = 4.0
# Output tokens to reserve for a request without `max_tokens`, until the first answer shows a typical length.
FIRST_OUTPUT = 512.0
# The `schema_retries` of a caller that sets none.
DEFAULT_SCHEMA_RETRIES = 2


class Function(TypedDict):
    name: str
    arguments: str  # JSON text, as the model wrote it


class CustomInput(TypedDict):
    name: str
    input: str  # free text, as the model wrote it


class ToolCall(TypedDict, total=False):
    """A call of a function, or of one of OpenAI's custom tools, which take free text. Other types are kept as they came."""

    id: Required[str]
    type: Required[str]  # "function", "custom", …
    function: Function
    custom: CustomInput


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
    """Messages to be answered, with their own settings: an id, overrides of generation, model and adapter."""

    messages: list[Message]
    id: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    adapter: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    turns: list[Any] = field(default_factory=list)  # further user messages, each sent after the answer to the one before
    extra_body: dict[str, Any] = field(default_factory=dict)  # fields of a request body that Eagleray has no name for
    continue_answer: bool = False  # the last message is the beginning of the answer
    task: str = CHAT  # see `TASKS`
    inputs: dict[str, Any] = field(default_factory=dict)  # of a task other than a chat: see `TaskKind.inputs`


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer as it is made: text, or the reasoning before it, of the choice `index`."""

    text: str = ""
    reasoning: str = ""
    index: int = 0


class Stream:
    """Takes the pieces of one answer, from any thread. Once it has `begun`, the request must not be sent again: its reader
    has seen the first pieces."""

    def __init__(self, pieces: asyncio.Queue[Delta | None]) -> None:
        self.loop, self.pieces = asyncio.get_running_loop(), pieces
        self.begun = False

    def put(self, delta: Delta) -> None:
        self.begun = True
        with contextlib.suppress(RuntimeError):  # the reader's event loop has ended
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, delta)


@dataclass(slots=True)
class Request:
    """One effective request: a conversation, or the input of another task, with all its parameters settled.

    `key` names it for logs and ledgers. Nothing changes a request: use `dataclasses.replace`. It is not frozen because
    Python needs three times as long to make a frozen object, and each row is one.
    """

    messages: list[Message]
    generation: GenerationParams = GenerationParams()
    model: str | None = None  # None: the engine's own
    adapter: str | None = None
    key: str = ""
    turns: list[Any] = field(default_factory=list)  # contents of further user messages; see `Conversation`
    extra_body: dict[str, Any] = field(default_factory=dict)  # see `Conversation`
    continue_answer: bool = False  # see `Conversation`
    own_generation: bool = False  # the conversation has parameters of its own
    task: str = CHAT  # see `TASKS`
    inputs: dict[str, Any] = field(default_factory=dict)  # see `Conversation`
    stream: Stream | None = None  # where an engine that can puts text as it comes; set by `Engine.stream`


@dataclass(slots=True)
class Choice:
    """One sampled answer. `logprobs` holds one entry per generated token, in OpenAI's `logprobs.content` form."""

    message: Message
    finish_reason: FinishReason
    logprobs: list[dict[str, Any]] | None = None


@dataclass(slots=True)
class Completion:
    """The result of one request: its choices (of a task other than a chat: its `values`), or an error, never both.

    `message`, `text`, `finish_reason` and `logprobs` are those of the first choice.
    """

    choices: list[Choice] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    model: str | None = None
    engine: str | None = None
    attempts: int = 1
    latency_s: float = 0.0  # of the answer alone
    reasoning: str | None = None
    error: Failure | None = None
    cost_usd: float | None = 0.0  # US$ for all tries; None: not known. Set by the engine that answered.
    place: int = 0  # of the engine that gave this: 0 is the first, 1 the first of `engine.fallback`
    passed_on: Failure | None = None  # the error of the first engine, if a fallback was asked after it
    dialogue: list[Message] = field(default_factory=list)  # between a request's messages and the last of its answers
    # Seconds before the answer began: waits for a place in the engine, for rate limits, and failed tries. None: not known.
    queued_s: float | None = 0.0
    # The result of a task other than a chat, by the names of `TaskKind.columns`. An embedding is a numpy array of float32.
    values: dict[str, Any] = field(default_factory=dict)

    def accumulate(self, before: Completion) -> None:
        """Adds the usage, cost, attempts and time of `before`, an earlier completion of the same row.

        An unknown cost makes the sum unknown.
        """
        self.usage.add(before.usage)
        known = self.cost_usd is not None and before.cost_usd is not None
        self.cost_usd = self.cost_usd + before.cost_usd if known else None  # type: ignore[operator]
        self.attempts += before.attempts
        self.latency_s += before.latency_s
        waits = self.queued_s is not None and before.queued_s is not None
        self.queued_s = self.queued_s + before.queued_s if waits else None  # type: ignore[operator]

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
    """A message's text, with its text parts joined. None if it has no text, for example only tool calls."""
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


def called(call: Mapping[str, Any]) -> tuple[Any, Any]:
    """The name of the tool that is called, and its argument: JSON text for a function, free text for a custom tool."""
    for kind, given in (("function", "arguments"), ("custom", "input")):
        if isinstance(found := call.get(kind), Mapping):
            return found.get("name"), found.get(given)
    return call.get("name") or call.get("type"), call.get("arguments")


def check_messages(messages: Any) -> list[Message]:
    """The messages of a conversation that an engine can answer. Legacy function calls become tool calls.

    Raises `EngineError("invalid_input")` if they are not a valid conversation.
    """
    if not isinstance(messages, list):
        raise invalid(f"messages must be a list, not {type(messages).__name__}")
    if not messages:
        raise invalid("messages is empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise invalid(f"messages[{i}] must be an object, not {type(message).__name__}")
        role = message.get("role")
        if role == "function" or message.get("function_call"):
            return check_messages(_with_tool_calls(messages))
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
        elif content is not None or role != "assistant":
            raise invalid(f"messages[{i}].content must be text or a list of parts, not {type(content).__name__}")
        elif not any(message.get(name) for name in _IN_PLACE_OF_CONTENT):
            raise invalid(f"messages[{i}] has neither content nor tool_calls")
    return messages


# Fields that an assistant message may have in place of content. `refusal` is text. `audio` names an answer that OpenAI
# stores.
_IN_PLACE_OF_CONTENT = ("tool_calls", "refusal", "audio")


def _with_tool_calls(messages: list[Any]) -> list[Any]:
    """The messages with `function_call` and the role `function`, OpenAI's form before 2023-11, as tool calls."""
    out: list[Any] = []
    waiting: list[str] = []  # ids of calls that have no result yet
    for i, message in enumerate(messages):
        if isinstance(message, dict) and (call := message.get("function_call")):
            waiting.append(f"call_{i}")
            rest = {name: value for name, value in message.items() if name != "function_call"}
            message = {"content": None, **rest, "tool_calls": [{"id": f"call_{i}", "type": "function", "function": call}]}
        elif isinstance(message, dict) and message.get("role") == "function":
            if not waiting:
                raise invalid(f"messages[{i}] has the role 'function', but no function_call is before it")
            message = {**message, "role": "tool", "tool_call_id": waiting.pop(0)}
        out.append(message)
    return out


def clean_message(message: Message) -> dict[str, Any]:
    """The message without fields that no engine takes: nulls, empty `tool_calls`, and the `weight` of training files."""
    return {
        name: value
        for name, value in message.items()
        if name != "weight" and (value is not None or name == "content") and (value != [] or name != "tool_calls")
    }


def plain_message(message: Message) -> Message:
    """The message for an engine that knows neither `refusal` nor `audio`: their text becomes the content.

    Raises `EngineError("invalid_input")` for audio without a transcript.
    """
    if message.get("content") is not None or message.get("tool_calls"):
        return message
    audio, said = message.get("audio"), message.get("refusal")
    if isinstance(audio, Mapping):
        said = said or audio.get("transcript")
    if not isinstance(said, str):
        raise invalid("an assistant message is audio without a transcript, which only OpenAI's chat API can read")
    return {**message, "content": said}


def custom_tool_place(request: Request) -> str | None:
    """The first place in a request that has one of OpenAI's custom tools, or a call of one; None if there is none."""
    for tool in request.generation.tools or ():
        # Anthropic's own form has the type `custom` too, but no field `custom`.
        if tool.get("type") == "custom" and isinstance(tool.get("custom"), Mapping):
            return "generation.tools"
    for i, message in enumerate(request.messages):
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, Mapping) and call.get("type") == "custom":
                return f"messages[{i}].tool_calls"
    return None


# Fields of OpenAI's request bodies that do not change an answer.
_WITHOUT_EFFECT = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)


def with_effect(extra_body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a body that may change an answer."""
    return {name: value for name, value in extra_body.items() if name not in _WITHOUT_EFFECT}


_CONVERSATION_KEYS = tuple(f.name for f in fields(Conversation))


def to_request(conversation: Conversation | Mapping[str, Any], base: GenerationParams) -> Request:
    """A conversation with its own overrides laid over `base`. Raises `EngineError("invalid_input")`."""
    if isinstance(conversation, Conversation):
        given: Mapping[str, Any] = {name: getattr(conversation, name) for name in _CONVERSATION_KEYS}
    elif isinstance(conversation, (dict, Mapping)):  # the check for a dict is faster
        given = conversation
        if "messages" not in given and "inputs" not in given:
            raise invalid(f"a conversation needs 'messages'; this one has {', '.join(map(str, given)) or 'nothing'}")
    else:
        raise invalid(f"a conversation is a Conversation or a mapping, not {type(conversation).__name__}")
    generation, turns, inputs = given.get("generation"), given.get("turns", []), given.get("inputs", {})
    if generation and not isinstance(generation, Mapping):
        raise invalid(f"generation must be a mapping of parameters, not {generation!r:.60}")
    if not isinstance(turns, list):
        raise invalid(f"turns must be a list of user messages, not {turns!r:.60}")
    messages, task = given.get("messages", []), given.get("task", CHAT)
    messages = check_messages(messages) if messages or not inputs else []
    check_inputs(task, messages, inputs)
    return Request(
        messages,
        base.override(generation) if generation else base,
        given.get("model"),
        given.get("adapter"),
        given.get("id") or "",
        turns,
        given.get("extra_body", {}),
        given.get("continue_answer", False),
        bool(generation),
        task,
        dict(inputs),
    )
