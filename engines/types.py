"""The domain: what goes into an engine and what comes out.

Messages are plain JSON-shaped dicts in the OpenAI chat form (typed here as `TypedDict`s), so that a conversation
keeps every field its author wrote, known to us or not. Everything Eagleray itself fills in is a dataclass.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, Required, TypedDict

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES = frozenset(("system", "developer", "user", "assistant", "tool"))

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]

ErrorType = Literal[
    "invalid_input",
    "context_length",
    "content_filter",
    "auth",
    "not_found",
    "bad_request",
    "rate_limit",
    "server",
    "timeout",
    "connection",
    "bad_response",
    "schema_mismatch",
    "engine_crash",
    "cancelled",
    "budget",
]

# Local engines must bound an answer; used where the caller names no `max_tokens`.
DEFAULT_MAX_TOKENS = 1024
# Bytes of a request's body for each token of input, before the provider has told better.
BYTES_PER_TOKEN = 4.0
# What an answer is reserved with where the request does not bound it and none has come yet; tokens.
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


class EaglerayError(Exception):
    """Base of every error this project raises on purpose; its text is one line a user can act on."""


class ConfigError(EaglerayError):
    """The configuration is wrong (exit status 2)."""


class Outage(EaglerayError):
    """A server has not answered for longer than the run wants to wait; what is done is kept (exit status 4)."""


class EngineError(EaglerayError):
    """One request failed; becomes that row's `error`, never a crash.

    `retryable` says whether the same request may succeed later; what to do about it is the caller's policy.
    """

    def __init__(self, type: ErrorType, message: str, *, status: int | None = None, retryable: bool = False) -> None:
        super().__init__(message)
        self.type: ErrorType = type
        self.status = status
        self.retryable = retryable
        self.retry_after: float | None = None  # seconds a provider asks to wait
        self.attempts = 1
        self.usage: Usage | None = None  # of an answer that has to be paid all the same; None: nothing was answered

    def __reduce__(self) -> Any:
        return _rebuild_engine_error, (self.type, str(self), self.status, self.retryable)


def _rebuild_engine_error(type: ErrorType, message: str, status: int | None, retryable: bool) -> EngineError:
    return EngineError(type, message, status=status, retryable=retryable)


def invalid(message: str) -> EngineError:
    return EngineError("invalid_input", message)


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"`, or a list of the known names where none is close and they are few."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(known)})" if len(known) <= 24 else ""


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """How to sample. `None` leaves the choice to the engine; local engines then decode greedily."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None  # token id (as text, like OpenAI's) -> bias added to its logit
    logprobs: int | None = None  # alternatives per generated token; 0 gives the chosen token's alone
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    schema_retries: int | None = None  # of answers that are not what response_format asks for

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> GenerationParams:
        """Checked parameters from plain values. Raises `EngineError("invalid_input")` naming the field."""
        return cls().override(values)

    def override(self, values: Mapping[str, Any]) -> GenerationParams:
        """These parameters with `values` laid over them; a value of None leaves the field as it is."""
        given = {name: value for name, value in values.items() if value is not None}
        if not given:
            return self
        return dataclasses.replace(self, **{name: _check_param(name, value) for name, value in given.items()})

    def given(self) -> dict[str, Any]:
        """Only the fields somebody set, in declaration order, of those that shape an answer."""
        names = (name for name in GENERATION_FIELDS if name != "schema_retries")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


GENERATION_FIELDS = tuple(f.name for f in dataclasses.fields(GenerationParams))

_POSITIVE_INT = {"max_tokens", "n"}
_INT = {"top_k", "seed", "logprobs", "schema_retries"}
# name -> (lowest, highest), both allowed
_FLOAT_RANGE = {
    "temperature": (0.0, float("inf")),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, float("inf")),
}
RESPONSE_FORMATS = ("text", "json_object", "json_schema", "regex", "choice", "grammar")


def _check_param(name: str, value: Any) -> Any:
    """One generation parameter, checked and in its canonical type."""
    if name in _POSITIVE_INT or name in _INT:
        if name == "logprobs" and isinstance(value, bool):  # OpenAI's chat form: true, with top_logprobs beside it
            return 0 if value else None
        if isinstance(value, float) and value.is_integer():  # Parquet and YAML may carry 256 as 256.0
            value = int(value)
        least = 1 if name in _POSITIVE_INT else (0 if name in ("logprobs", "schema_retries") else None)
        if name in _POSITIVE_INT and isinstance(value, int) and value >= 1 << 31:
            raise invalid(f"{name} must be below 2,147,483,648")
        if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
            bound = f" of at least {least}" if least is not None else ""
            raise invalid(f"{name} must be a whole number{bound}, not {value!r}")
        return value
    if name in _FLOAT_RANGE:
        low, high = _FLOAT_RANGE[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise invalid(f"{name} must be a number between {low} and {high}, not {value!r}")
        try:
            return float(value)
        except OverflowError:
            raise invalid(f"{name} is too large a number") from None
    if name == "stop":
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise invalid(f"stop must be a non-empty text or a list of them, not {value!r}")
        return stops or None
    if name == "stop_token_ids":
        if not isinstance(value, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in value):
            raise invalid(f"stop_token_ids must be a list of token ids, not {value!r}")
        return value or None
    if name == "logit_bias":
        if not isinstance(value, Mapping):
            raise invalid(f"logit_bias must map token ids to numbers, not {value!r}")
        try:
            return {str(int(token)): float(bias) for token, bias in value.items()} or None
        except (TypeError, ValueError, OverflowError):
            raise invalid(f"logit_bias must map token ids to numbers, not {value!r}") from None
    if name == "response_format":
        if isinstance(value, Mapping) and value.get("type") == "object":  # a schema alone
            return {"type": "json_schema", "json_schema": {"schema": dict(value)}}
        if not isinstance(value, Mapping) or value.get("type") not in RESPONSE_FORMATS:
            raise invalid(f"response_format needs a 'type' among {', '.join(RESPONSE_FORMATS)}, not {value!r:.200}")
        return None if value["type"] == "text" else dict(value)
    if name == "tools":
        if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
            raise invalid(f"tools must be a list of tool definitions, not {value!r:.200}")
        return value or None
    if name == "tool_choice":
        if not isinstance(value, (str, Mapping)):
            raise invalid(f"tool_choice must be a text or an object, not {value!r:.200}")
        return value
    if name == "reasoning_effort":
        if not isinstance(value, str):
            raise invalid(f"reasoning_effort must be a text, not {value!r:.200}")
        return value
    raise invalid(f"'{name}' is not a generation parameter{nearest(name, GENERATION_FIELDS)}")


def json_schema_of(response_format: Mapping[str, Any]) -> dict[str, Any]:
    """The schema inside `{"type": "json_schema", "json_schema": {"schema": …}}`, or with the schema put there directly."""
    outer = response_format.get("json_schema", response_format.get("schema"))
    schema = outer.get("schema", outer) if isinstance(outer, Mapping) else None
    if not isinstance(schema, Mapping):
        raise invalid("response_format of type json_schema needs a 'json_schema' object holding a 'schema'")
    return dict(schema)


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
class Usage:
    """Tokens of one request, or of all tries of a row.

    Always cached_input + cache_write <= input, cache_write_1h <= cache_write and reasoning <= output: a provider that
    reports more has its parts cut. `known` is False where an answer came without its usage; the counts then hold only
    what other tries reported.
    """

    input: int = 0
    cached_input: int = 0  # part of `input` that was read from a prompt cache
    output: int = 0
    cache_write: int = 0  # part of `input` that was written to a prompt cache
    reasoning: int = 0  # part of `output`
    cache_write_1h: int = 0  # part of `cache_write` that is kept for an hour, which costs more; not in the ledger
    known: bool = True

    def __post_init__(self) -> None:
        self.cached_input = min(self.cached_input, self.input)
        self.cache_write = min(self.cache_write, self.input - self.cached_input)
        self.cache_write_1h = min(self.cache_write_1h, self.cache_write)
        self.reasoning = min(self.reasoning, self.output)

    def add(self, other: Usage) -> None:
        """Adds the tokens of another try; the sum is known if both are."""
        self.input += other.input
        self.cached_input += other.cached_input
        self.output += other.output
        self.cache_write += other.cache_write
        self.reasoning += other.reasoning
        self.cache_write_1h += other.cache_write_1h
        self.known = self.known and other.known


@dataclass(slots=True)
class Failure:
    type: ErrorType
    message: str
    status: int | None = None
    retryable: bool = False

    @classmethod
    def of(cls, error: EngineError) -> Failure:
        return cls(error.type, str(error), error.status, error.retryable)


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

    def carry(self, before: Completion) -> None:
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
