"""One input row to a conversation and its overrides, for every dataset format: pure functions, no I/O."""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox
from jinja2.exceptions import SecurityError

from engines.types import GENERATION_FIELDS, ROLES, ConfigError, EngineError, Message, check_messages, invalid, nearest
from pipeline.lossless import loads

FORMATS = ("auto", "messages", "oumi", "openai_batch", "sharegpt", "prompt")
# What a column can be mapped to; every generation parameter too.
COLUMN_ROLES = ("id", "messages", "conversations", "prompt", "system", "model", "adapter", "generation", "tools")
_ALL_ROLES = frozenset((*COLUMN_ROLES, *GENERATION_FIELDS))
# The column that holds the conversation, for each format; `auto` tries them in this order.
_SOURCE = {
    "messages": "messages",
    "oumi": "messages",
    "sharegpt": "conversations",
    "openai_batch": "body",
    "prompt": "prompt",
}
_CONTENT = ("messages", "conversations", "body", "prompt")
_IDS = ("id", "conversation_id", "custom_id")

# fmt: off
OUTPUT_COLUMNS: tuple[str, ...] = (
    "id", "index", "response", "messages", "finish_reason", "tool_calls", "reasoning", "usage", "model", "engine",
    "attempts", "latency_s", "error", "choices", "logprobs",
)
# fmt: on
# A table with all of these is a data/ file of ours: its `model`, `messages` … are what an earlier run wrote.
_OURS = frozenset(("id", "index", "response", "messages", "finish_reason", "model", "engine", "attempts", "error"))
_ERROR_FIELDS = frozenset(("type", "message", "status", "retryable"))

# A prompt beyond this is a loop gone wrong: no model reads it.
MAX_RENDERED = 8 << 20


class ArrowRow(dict[str, Any]):
    """A row of a Parquet file. Its nested values come from Arrow structs, which hold a null for every absent field."""


@dataclass(slots=True)
class Parsed:
    """What a row asks for. `generation`, `model` and `adapter` override the run's."""

    messages: list[Message]
    id: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    adapter: str | None = None


class RowParser:
    """Rows to conversations. Small and picklable: built once for each task.

    Raises `ConfigError` for a format, column role or template that cannot work.
    """

    def __init__(self, format: str = "auto", columns: Mapping[str, str] | None = None, template: Any = None) -> None:
        if format not in FORMATS:
            raise ConfigError(f"dataset.format: there is no format '{format}'{nearest(format, FORMATS)}")
        self.format, self.columns, self.template = format, dict(columns or {}), template
        for role, column in self.columns.items():
            if role not in _ALL_ROLES:
                raise ConfigError(f"dataset.columns: there is no role '{role}'{nearest(role, _ALL_ROLES)}")
            if not isinstance(column, str) or not column:
                raise ConfigError(f"dataset.columns.{role} must be the name of a column, not {column!r:.60}")
        self._render = _Template(template) if template is not None else None
        self._order = self._content_order()
        self._fields = {role: name for role, name in self.columns.items() if role in GENERATION_FIELDS}

    def __reduce__(self) -> Any:  # compiled templates do not pickle
        return RowParser, (self.format, self.columns, self.template)

    def _content_order(self) -> tuple[str, ...]:
        """The columns that may hold the conversation, by role, in the order they are looked for."""
        mapped = tuple(role for role in _CONTENT if role in self.columns)
        if mapped and self._render is not None:
            raise ConfigError(f"dataset.template and dataset.columns.{mapped[0]} both say where the conversation is")
        if self.format == "auto":
            return mapped or _CONTENT
        for role in mapped:
            if role != _SOURCE[self.format]:
                raise ConfigError(f"dataset.columns.{role} is not read with dataset.format={self.format}")
        return (_SOURCE[self.format],)

    def consumed(self) -> frozenset[str]:
        """The input columns whose content our own `id` and `messages` hold, so that they need not pass through."""
        names = set()
        if self.columns.get("id", "id") == "id":
            names.add("id")
        if self._render is None and "messages" in self._order and self.columns.get("messages", "messages") == "messages":
            names.add("messages")
        return frozenset(names)

    def parse(self, columns: dict[str, Any]) -> Parsed:
        """The conversation in a row, which is left as it is. Raises `EngineError("invalid_input")` with the reason."""
        for role, name in self.columns.items():
            if name not in columns:
                raise invalid(f"there is no column '{name}' (dataset.columns.{role}) among {_names(columns)}")
        ours = "engine" in columns and columns.keys() >= _OURS
        padded = isinstance(columns, ArrowRow)
        parsed = Parsed([], id=self._id(columns))
        render = self._render
        messages = render(columns) if render is not None else self._messages(columns, padded, ours, parsed)
        parsed.messages = check_messages(messages)
        self._overrides(columns, padded, ours, parsed)
        return parsed

    def _get(self, columns: Mapping[str, Any], role: str) -> Any:
        return columns.get(self.columns.get(role, role))

    def _id(self, columns: Mapping[str, Any]) -> str | None:
        for name in (self.columns["id"],) if "id" in self.columns else _IDS:
            value = columns.get(name)
            if value is not None and value != "":
                if isinstance(value, str):
                    return value
                return json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)
        return None

    def _messages(self, columns: Mapping[str, Any], padded: bool, ours: bool, parsed: Parsed) -> list[Any]:
        # A failed row of ours from a batch file has the body it came from beside the messages; only the body has all.
        order = ("body", *self._order) if ours and "body" in self._order else self._order
        for role in order:
            value = self._get(columns, role)
            if value is not None:
                break
        else:
            if role in self.columns:
                raise invalid(f"the column '{self.columns[role]}' (dataset.columns.{role}) is null")
            wanted = " or ".join([", ".join(order[:-1]), order[-1]] if order[1:] else order)
            hint = " (map one with dataset.columns or dataset.template)"
            raise invalid(f"no {wanted} among the columns {_names(columns)}{hint}")
        if role == "body":
            return _from_body(_object(value, "body", padded), columns, parsed)
        system = self._get(columns, "system") if role != "messages" or "system" in self.columns else None
        if role == "prompt":
            messages = _from_prompt(value, padded)
        else:
            messages = _list(value, role, padded)
            oumi = self.format == "oumi" or (self.format == "auto" and columns.get("conversation_id") is not None)
            messages = _from_oumi(messages, drop_ids=oumi) if role == "messages" else _from_sharegpt(messages)
        if system is not None and system != "" and _first_role(messages) not in ("system", "developer"):
            messages = [{"role": "system", "content": _text(system, "system")}, *messages]
        return messages

    def _overrides(self, columns: Mapping[str, Any], padded: bool, ours: bool, parsed: Parsed) -> None:
        generation = parsed.generation
        tools = self._get(columns, "tools")
        if tools is not None and tools != "":
            tools = _list(tools, "tools", padded)
            if tools:
                generation["tools"] = tools
        own = self._get(columns, "generation")
        if own is not None and own != "":
            generation.update(_object(own, "generation", padded))
        for role, name in self._fields.items():
            if role != "tools" and columns[name] is not None:
                generation[role] = _arrow_value(columns[name]) if padded else columns[name]
        # In a data/ file of ours `model` is what answered; the row's own is kept as `input_model`.
        model = columns.get("input_model") if ours and "model" not in self.columns else self._get(columns, "model")
        parsed.model = self._name(model, "model") or parsed.model
        parsed.adapter = self._name(self._get(columns, "adapter"), "adapter") or parsed.adapter

    def _name(self, value: Any, role: str) -> str | None:
        """A model or adapter; a column that happens to have that name but holds something else is not one."""
        if isinstance(value, str) and value:
            return value
        if value is not None and value != "" and role in self.columns:
            raise invalid(f"the column '{self.columns[role]}' (dataset.columns.{role}) must hold text, not {_kind(value)}")
        return None


def passthrough_names(columns: Iterable[str], parser: RowParser) -> dict[str, str]:
    """Input column -> its name in the output, for those that pass through.

    What `parser` reads as id and messages is in our columns of that name already. Another column with a name of ours
    becomes `input_<name>`. Where the input is a data/ file of ours, our columns are written anew and do not pass; of an
    errors/ file that is only `error`, known by its fields if `columns` maps names to Arrow types.
    """
    names = list(columns)
    dropped = set(OUTPUT_COLUMNS) if set(names) >= _OURS else set(parser.consumed())
    if isinstance(columns, Mapping) and _is_our_error(columns.get("error")):
        dropped.add("error")
    kept = [name for name in names if name not in dropped]
    out = {name: name for name in kept if name not in OUTPUT_COLUMNS}
    for name in kept:
        if name in OUTPUT_COLUMNS:
            renamed = f"input_{name}"
            while renamed in out.values():
                renamed = f"input_{renamed}"
            out[name] = renamed
    return {name: out[name] for name in kept}


def _is_our_error(type: Any) -> bool:
    return {getattr(f, "name", None) for f in getattr(type, "fields", ())} == _ERROR_FIELDS


# --- values ----------------------------------------------------------------------------------------------------------


def _names(columns: Mapping[str, Any], most: int = 20) -> str:
    names = [str(name) for name in columns]
    return (", ".join(names[:most]) + (", …" if len(names) > most else "")) or "none"


def _kind(value: Any) -> str:
    return {"dict": "an object", "list": "a list", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)


def _first_role(messages: list[Any]) -> Any:
    return messages[0].get("role") if messages and isinstance(messages[0], dict) else None


def _text(value: Any, what: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise invalid(f"{what} is not UTF-8 text") from None
    if not isinstance(value, str):
        raise invalid(f"{what} must be text, not {_kind(value)}")
    return value


def _from_text(value: Any, what: str) -> Any:
    """`value`, parsed if it is JSON text."""
    if not isinstance(value, (str, bytes)):
        return value
    try:
        return loads(value.encode() if isinstance(value, str) else value)
    except ValueError as error:
        raise invalid(f"{what} is text that is not JSON: {error}") from None


def _list(value: Any, what: str, padded: bool) -> list[Any]:
    parsed = _from_text(value, what)
    if not isinstance(parsed, list):
        raise invalid(f"{what} must be a list, not {_kind(parsed)}")
    if padded and parsed is value:
        return [_arrow_value(item) for item in parsed]
    return list(parsed)


def _object(value: Any, what: str, padded: bool) -> dict[str, Any]:
    parsed = _from_text(value, what)
    if not isinstance(parsed, dict):
        raise invalid(f"{what} must be an object, not {_kind(parsed)}")
    return _arrow_value(parsed) if padded and parsed is value else dict(parsed)


def _arrow_value(value: Any) -> Any:
    """A value out of Arrow as JSON has it: without the nulls that pad structs, and with JSON's types only.

    An assistant's empty `content` stays: there it says that the message is tool calls alone.
    """
    if isinstance(value, dict):
        assistant = value.get("role") == "assistant"
        return {k: _arrow_value(v) for k, v in value.items() if v is not None or (assistant and k == "content")}
    if isinstance(value, (list, tuple)):
        return [_arrow_value(v) for v in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


# --- formats ---------------------------------------------------------------------------------------------------------


def _from_prompt(value: Any, padded: bool) -> list[Any]:
    """A text, or (as preference datasets have it) the messages themselves."""
    if isinstance(value, list):
        return _from_oumi(_list(value, "prompt", padded), drop_ids=False)
    return [{"role": "user", "content": _text(value, "prompt")}]


def _from_body(body: dict[str, Any], columns: Mapping[str, Any], parsed: Parsed) -> list[Any]:
    """A line of an OpenAI batch file. What is no generation parameter in its body (`user`, `stream`, …) is not read."""
    messages = _from_text(body.get("messages"), "body.messages")
    if messages is None:
        url = columns.get("url")
        raise invalid(f"body has no messages{f' (its url is {url!r:.80})' if url else ''}")
    generation = {name: body[name] for name in GENERATION_FIELDS if body.get(name) is not None}
    limit = body.get("max_completion_tokens")
    if limit is not None:
        generation["max_tokens"] = limit
    if isinstance(body.get("logprobs"), bool):  # chat's form: a switch, with the number of alternatives beside it
        del generation["logprobs"]
        if body["logprobs"]:
            generation["logprobs"] = body.get("top_logprobs") or 0
    parsed.generation = generation
    model = body.get("model")
    parsed.model = model if isinstance(model, str) and model else None
    return _from_oumi(messages, drop_ids=False) if isinstance(messages, list) else messages


def _from_oumi(messages: list[Any], drop_ids: bool) -> list[Any]:
    """Oumi's content parts in OpenAI's form; `drop_ids`: message ids too, which no model is asked with."""
    out = []
    for message in messages:
        if isinstance(message, dict):
            content = message.get("content")
            if isinstance(content, list):
                parts = [_oumi_part(part) for part in content]
                if any(new is not old for new, old in zip(parts, content, strict=True)):
                    message = {**message, "content": parts}
            if drop_ids and "id" in message:
                message = {name: value for name, value in message.items() if name != "id"}
        out.append(message)
    return out


# The first base64 characters of an image file tell its type.
_IMAGE_TYPES = {"iVBOR": "png", "/9j/": "jpeg", "R0lGOD": "gif", "UklGR": "webp"}


def _oumi_part(part: Any) -> Any:
    """One content part; the very same object where it is in OpenAI's form already."""
    if not isinstance(part, dict):
        return part
    kind, content = part.get("type"), part.get("content")
    if kind == "text" and "text" not in part and isinstance(content, str):
        return {"type": "text", "text": content}
    if kind == "image_url" and "image_url" not in part and isinstance(content, str):
        return {"type": "image_url", "image_url": {"url": content}}
    if kind == "image_path" and isinstance(content, str):
        return {"type": "image_url", "image_url": {"url": content if "://" in content else f"file://{content}"}}
    binary = part.get("binary")
    if kind == "image_binary" and isinstance(binary, (str, bytes)):
        text = base64.b64encode(binary).decode() if isinstance(binary, bytes) else binary
        subtype = next((name for start, name in _IMAGE_TYPES.items() if text.startswith(start)), "png")
        return {"type": "image_url", "image_url": {"url": f"data:image/{subtype};base64,{text}"}}
    return part


# fmt: off
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "developer": "developer",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "function_call",
}
# fmt: on


def _from_sharegpt(turns: list[Any]) -> list[Any]:
    """`from`/`value` turns as messages. A function call and the observation after it get ids that bind them."""
    messages: list[Any] = []
    waiting: list[str] = []  # ids of calls without their observation yet
    calls = itertools.count()
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise invalid(f"conversations[{i}] must be an object, not {_kind(turn)}")
        if "from" not in turn and "role" in turn:  # messages under ShareGPT's column name
            messages.append(turn)
            continue
        speaker = turn.get("from")
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            hint = nearest(speaker, _SHAREGPT_ROLES) if isinstance(speaker, str) else ""
            raise invalid(f"conversations[{i}] has the unknown speaker {speaker!r:.60}{hint}")
        value = turn.get("value")
        if role == "function_call":
            message = _function_call(value, i, calls)
            waiting.extend(call["id"] for call in message["tool_calls"])
        else:
            message = {"role": role, "content": _text(value, f"conversations[{i}].value")}
            if role == "tool" and waiting:
                message["tool_call_id"] = waiting.pop(0)
        messages.append(message)
    return messages


def _function_call(value: Any, i: int, calls: Iterator[int]) -> dict[str, Any]:
    given = _from_text(value, f"conversations[{i}].value")
    tool_calls = []
    for call in given if isinstance(given, list) and given else [given]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise invalid(f"conversations[{i}].value must be a function call with a 'name'")
        arguments = call.get("arguments", call.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        function = {"name": call["name"], "arguments": text}
        tool_calls.append({"id": f"call_{next(calls)}", "type": "function", "function": function})
    return {"role": "assistant", "content": None, "tool_calls": tool_calls}


# --- templates -------------------------------------------------------------------------------------------------------


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Refuses what a sandbox must, and the two operators with which a short template makes a huge value."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, int) and abs(right) > 1000:
            raise SecurityError("a power too large")
        sized, times = (left, right) if isinstance(right, int) else (right, left)
        if operator == "*" and isinstance(times, int) and hasattr(sized, "__len__") and len(sized) * times > MAX_RENDERED:
            raise SecurityError("a repetition too large")
        return super().call_binop(context, operator, left, right)


def _printed(value: Any) -> Any:
    """Called for every value a template prints. "None" in a prompt is never what was meant."""
    if value is None:
        raise invalid("the template prints a null; write {{ column or '' }} where a value may be null")
    return value


def _environment() -> jinja2.Environment:
    environment = _Sandbox(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_printed)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent, default=str
    )
    return environment


class _Template:
    """`dataset.template`, compiled: the columns of a row to messages."""

    def __init__(self, template: Any) -> None:
        if isinstance(template, str):
            pairs: list[tuple[Any, Any]] = [("user", template)]
        elif isinstance(template, Mapping):
            pairs = list(template.items())
        elif isinstance(template, (list, tuple)) and all(
            isinstance(part, Mapping) and set(part) == {"role", "content"} for part in template
        ):
            pairs = [(part["role"], part["content"]) for part in template]
        else:
            raise ConfigError("dataset.template must be a text, a list of {role, content}, or {system: …, user: …}")
        if not pairs:
            raise ConfigError("dataset.template is empty")
        environment = _environment()
        self.parts: list[tuple[str, Callable[..., Iterator[str]]]] = []
        self.wanted: set[str] = set()
        for role, text in pairs:
            if not isinstance(role, str) or role not in ROLES:
                raise ConfigError(f"dataset.template: there is no role {role!r:.60}{nearest(str(role), ROLES)}")
            if not isinstance(text, str):
                raise ConfigError(f"dataset.template: the {role} message must be a text, not {_kind(text)}")
            try:
                self.parts.append((role, environment.from_string(text).generate))
                self.wanted |= jinja2.meta.find_undeclared_variables(environment.parse(text))
            except jinja2.TemplateSyntaxError as error:
                where = f"the {role} message, " if len(pairs) > 1 else ""
                raise ConfigError(f"dataset.template: {where}line {error.lineno}: {error.message}") from None
        self.wanted -= {"row", *environment.globals}

    def __call__(self, columns: Mapping[str, Any]) -> list[Any]:
        variables = {**columns, "row": dict(columns)}
        try:
            return [{"role": role, "content": _bounded(render(variables))} for role, render in self.parts]
        except EngineError:
            raise
        except jinja2.UndefinedError as error:
            name = re.fullmatch(r"'(.+)' is undefined", error.message or "")
            if name and name[1] in self.wanted and name[1] not in columns:
                raise invalid(f"the template needs the column '{name[1]}'; this row has {_names(columns)}") from None
            raise invalid(f"the template failed: {_first_line(error)}") from None
        except Exception as error:  # a template may raise anything; whatever it is, it is this row's
            raise invalid(f"the template failed: {type(error).__name__}: {_first_line(error)}") from None


def _bounded(pieces: Iterator[str]) -> str:
    out, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_RENDERED:
            raise invalid(f"the template gives more than {MAX_RENDERED:,} characters")
        out.append(piece)
    text = "".join(out)
    text.encode()  # a lone surrogate, written as an escape in the template, fails here and not in the middle of a run
    return text


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
