"""Converts an input row to a conversation and its overrides, for every dataset format. Pure functions without I/O."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import jinja2
import pyarrow as pa
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engines.errors import ConfigError, EngineError, invalid, must_be, nearest, no_such
from engines.params import GENERATION_FIELDS
from engines.text import one_line
from engines.types import ROLES, Message, check_messages
from pipeline.storage.exact_json import loads

# The roles that a column can be mapped to. Every generation parameter is a role too.
COLUMN_ROLES = ("id", "messages", "conversations", "prompt", "turns", "system", "model", "adapter", "generation", "tools")
_ALL_ROLES = frozenset((*COLUMN_ROLES, *GENERATION_FIELDS))
# The role of the column that holds the conversation, for each format. `auto` tries them in this order.
_SOURCE = {
    "messages": "messages",
    "oumi": "messages",
    "sharegpt": "conversations",
    "openai_batch": "body",
    "prompt": "prompt",
    "turns": "turns",
}
_CONTENT = tuple(dict.fromkeys(_SOURCE.values()))
FORMATS = ("auto", *_SOURCE)
_IDS = ("id", "conversation_id", "custom_id")

# fmt: off
OUTPUT_COLUMNS: tuple[str, ...] = (
    "id", "index", "response", "messages", "finish_reason", "tool_calls", "reasoning", "usage", "cost_usd", "model",
    "engine", "attempts", "latency_s", "error", "choices", "logprobs",
)
# fmt: on
# A table with all of these columns is a data/ file of Eagleray: an earlier run wrote its `model`, `messages` and so on.
_OURS = frozenset(("id", "index", "response", "messages", "finish_reason", "model", "engine", "attempts", "error"))
_ERROR_FIELDS = frozenset(("type", "message", "status", "retryable"))


class ArrowRow(dict[str, Any]):
    """A row of a Parquet file. Its nested values come from Arrow structs, which have a null for every absent field."""


@dataclass(slots=True)
class Parsed:
    """The request in a row. `generation`, `model` and `adapter` override those of the run."""

    messages: list[Message]
    id: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    adapter: str | None = None
    turns: list[Any] = field(default_factory=list)  # the user's later messages, each sent after an answer


class RowParser:
    """Parses rows into conversations. Small and picklable: built once for each task.

    Raises `ConfigError` for an invalid format, column role or template.
    """

    def __init__(self, format: str = "auto", columns: Mapping[str, str] | None = None, template: Any = None) -> None:
        if format not in FORMATS:
            raise ConfigError(f"dataset.format: {no_such('format', format, FORMATS)}")
        self.format, self.columns, self.template = format, dict(columns or {}), template
        for role, column in self.columns.items():
            if role not in _ALL_ROLES:
                raise ConfigError(f"dataset.columns: {no_such('role', role, _ALL_ROLES)}")
            if not isinstance(column, str) or not column:
                raise ConfigError(must_be(f"dataset.columns.{role}", "the name of a column", column, 60))
        mapped = tuple(role for role in _CONTENT if role in self.columns)
        if mapped and template is not None:
            raise ConfigError(f"dataset.template and dataset.columns.{mapped[0]} both say where the conversation is")
        # The roles of the columns that may hold the conversation, in the order of the search.
        self.order = (mapped or _CONTENT) if format == "auto" else (_SOURCE[format],)
        for role in mapped:
            if role not in self.order:
                raise ConfigError(f"dataset.columns.{role} is not read with dataset.format={format}")
        self._template = _compile(template) if template is not None else None
        self._fields = [role for role in self.columns if role in GENERATION_FIELDS and role != "tools"]

    def __reduce__(self) -> Any:  # compiled templates do not pickle
        return RowParser, (self.format, self.columns, self.template)

    def parse(self, columns: dict[str, Any]) -> Parsed:
        """The conversation in a row. Does not change the row. Raises `EngineError("invalid_input")` with the reason."""
        for role, name in self.columns.items():
            if name not in columns:
                raise invalid(f"there is no column '{name}' (dataset.columns.{role}) among {_names(columns)}")
        ours = "engine" in columns and columns.keys() >= _OURS
        parsed = Parsed([], id=self._id(columns))
        template = self._template
        messages = _render(template, columns) if template else self._messages(columns, ours, parsed)
        parsed.messages = check_messages(messages)
        self._overrides(columns, ours, parsed)
        return parsed

    def _get(self, columns: Mapping[str, Any], role: str) -> Any:
        value = columns.get(self.columns.get(role, role))
        if value is None or type(value) is str or type(value) is bytes or type(columns) is not ArrowRow:
            return value
        return _arrow_value(value)

    def _id(self, columns: Mapping[str, Any]) -> str | None:
        for name in (self.columns["id"],) if "id" in self.columns else _IDS:
            value = columns.get(name)
            if value is not None and value != "":
                return json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)
        return None

    def _messages(self, columns: Mapping[str, Any], ours: bool, parsed: Parsed) -> list[Any]:
        # A failed row that we wrote for a batch file has `body` and `messages`. Only `body` has everything.
        order = ("body", *self.order) if ours and "body" in self.order else self.order
        for role in order:
            value = self._get(columns, role)
            if value is not None:
                break
        else:
            if role in self.columns:
                raise invalid(f"the column '{self.columns[role]}' (dataset.columns.{role}) is null")
            wanted = " or ".join([", ".join(order[:-1]), order[-1]] if order[1:] else order)
            raise invalid(
                f"no {wanted} among the columns {_names(columns)} (map one with dataset.columns or dataset.template)"
            )
        if role == "body":
            return _from_body(_json(value, "body", dict), columns, parsed)
        if role == "prompt" and not isinstance(value, list):  # in preference datasets, `prompt` is a list of messages
            messages: list[Any] = [{"role": "user", "content": _text(value, "prompt")}]
        elif role == "turns":
            first, *parsed.turns = _json(value, "turns", list) or [None]
            for at, turn in enumerate([first, *parsed.turns]):
                if not turn or not isinstance(turn, (str, list)):
                    raise invalid(f"turns[{at}] must be text, or a list of content parts" if value else "turns is empty")
                check_messages([{"role": "user", "content": turn}])
            messages = [{"role": "user", "content": first}]
        elif role == "conversations":
            messages = _from_sharegpt(_json(value, role, list))
        else:
            oumi = self.format == "oumi" or (self.format == "auto" and columns.get("conversation_id") is not None)
            messages = _from_oumi(_json(value, role, list), drop_ids=oumi)
        system = self._get(columns, "system") if role != "messages" or "system" in self.columns else None
        if system:
            first = messages[0] if messages else None
            if not isinstance(first, dict) or first.get("role") not in ("system", "developer"):
                messages = [{"role": "system", "content": _text(system, "system")}, *messages]
        return messages

    def _overrides(self, columns: Mapping[str, Any], ours: bool, parsed: Parsed) -> None:
        generation = parsed.generation
        if (tools := self._get(columns, "tools")) and (tools := _json(tools, "tools", list)):
            generation["tools"] = tools
        if own := self._get(columns, "generation"):
            generation.update(_json(own, "generation", dict))
        for role in self._fields:
            if (value := self._get(columns, role)) is not None:
                generation[role] = value
        # In a data/ file that we wrote, `model` is the model that answered. The row's own is in `input_model`.
        model = columns.get("input_model") if ours and "model" not in self.columns else self._get(columns, "model")
        parsed.model = self._name(model, "model") or parsed.model
        parsed.adapter = self._name(self._get(columns, "adapter"), "adapter") or parsed.adapter

    def _name(self, value: Any, role: str) -> str | None:
        """The name of a model or adapter. None if an unmapped column of that name holds something other than text."""
        if isinstance(value, str) and value:
            return value
        if value and role in self.columns:
            raise invalid(f"the column '{self.columns[role]}' (dataset.columns.{role}) must hold text, not {_kind(value)}")
        return None


def passthrough_names(columns: Iterable[str], parser: RowParser, scores: Collection[str] = ()) -> dict[str, str]:
    """Maps each input column that passes through to its name in the output.

    The columns that `parser` reads as id and messages do not pass: our columns of these names hold their values. Any other
    column with one of our names, or with a name in `scores` (columns made from answers), becomes `input_<name>`. If the
    input is a data/ file that we wrote, none of our columns pass, because they are written again. In an errors/ file that
    we wrote, only `error` does not pass. It is recognized by its fields, which needs `columns` to map names to Arrow types.
    """
    names = list(columns)
    if set(names) >= _OURS:
        dropped = set(OUTPUT_COLUMNS)
    else:
        read = {"id"} if parser.template is not None else {"id", *parser.order}
        dropped = {name for name in ("id", "messages") if name in read and parser.columns.get(name, name) == name}
    error = columns.get("error") if isinstance(columns, Mapping) else None
    if isinstance(error, pa.StructType) and {part.name for part in error} == _ERROR_FIELDS:
        dropped.add("error")
    out = {name: name for name in names if name not in dropped}
    for name in out:
        if name in OUTPUT_COLUMNS or name in scores:
            renamed = f"input_{name}"
            while renamed in out or renamed in scores:
                renamed = f"input_{renamed}"
            out[name] = renamed
    return out


# --- values ----------------------------------------------------------------------------------------------------------


def _names(columns: Mapping[str, Any], limit: int = 20) -> str:
    names = [str(name) for name in columns]
    return (", ".join(names[:limit]) + (", …" if len(names) > limit else "")) or "none"


def _kind(value: Any) -> str:
    return {"dict": "an object", "list": "a list", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)


def _text(value: Any, what: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise invalid(f"{what} is not UTF-8 text") from None
    if not isinstance(value, str):
        raise invalid(f"{what} must be text, not {_kind(value)}")
    return value


def _json(value: Any, what: str, kind: type = object) -> Any:
    """The value, parsed if it is JSON text. Raises `EngineError` if the result is not of `kind`."""
    if isinstance(value, (str, bytes)):
        try:
            value = loads(value.encode() if isinstance(value, str) else value)
        except ValueError as error:
            raise invalid(f"{what} is text that is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise invalid(f"{what} must be {'a list' if kind is list else 'an object'}, not {_kind(value)}")
    return value


def _arrow_value(value: Any) -> Any:
    """Converts a value from Arrow to JSON types and drops the nulls that Arrow adds to structs.

    The null `content` of an assistant message stays: it means that the message consists of tool calls only.
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
    return str(value)


# --- formats ---------------------------------------------------------------------------------------------------------


def _from_body(body: dict[str, Any], columns: Mapping[str, Any], parsed: Parsed) -> list[Any]:
    """The messages of an OpenAI batch file's line. Other fields of the body than generation parameters (`user`, `stream`,
    …) are ignored."""
    messages = _json(body.get("messages"), "body.messages")
    if messages is None:
        url = columns.get("url")
        raise invalid(f"body has no messages{f' (its url is {url!r:.80})' if url else ''}")
    generation = {name: body[name] for name in GENERATION_FIELDS if body.get(name) is not None}
    limit = body.get("max_completion_tokens")
    if limit is not None:
        generation["max_tokens"] = limit
    if isinstance(body.get("logprobs"), bool):  # the form of chat completions: a switch, and `top_logprobs` as the number
        del generation["logprobs"]
        if body["logprobs"]:
            generation["logprobs"] = body.get("top_logprobs") or 0
    parsed.generation = generation
    model = body.get("model")
    parsed.model = model if isinstance(model, str) and model else None
    return _from_oumi(messages, drop_ids=False) if isinstance(messages, list) else messages


def _from_oumi(messages: list[Any], drop_ids: bool) -> list[Any]:
    """Converts Oumi's content parts to OpenAI's form. `drop_ids` also drops message ids, which no model receives."""
    out = []
    for message in messages:
        if isinstance(message, dict):
            if isinstance(message.get("content"), list):
                message = {**message, "content": [_oumi_part(part) for part in message["content"]]}
            if drop_ids:
                message = {name: value for name, value in message.items() if name != "id"}
        out.append(message)
    return out


# The first base64 characters of an image file, and its type.
_IMAGE_TYPES = {"iVBOR": "png", "/9j/": "jpeg", "R0lGOD": "gif", "UklGR": "webp"}


def _oumi_part(part: Any) -> Any:
    """One content part in OpenAI's form. A part that already has this form is returned unchanged."""
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
    """Converts `from`/`value` turns to messages. A function call and the observation after it get the same id."""
    messages: list[Any] = []
    waiting: list[str] = []  # ids of calls that have no observation yet
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
            hint = nearest(str(speaker), _SHAREGPT_ROLES)
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
    given = _json(value, f"conversations[{i}].value")
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


def _printed(value: Any) -> Any:
    """Called for every value that a template prints. Raises `EngineError` for None: a prompt must not contain "None"."""
    if value is None:
        raise invalid("the template prints a null; write {{ column or '' }} where a value may be null")
    return value


def _compile(template: Any) -> list[tuple[str, jinja2.Template]]:
    """Compiles `dataset.template` to pairs of a role and the template of its message. Raises `ConfigError`."""
    if isinstance(template, str):
        template = {"user": template}
    if isinstance(template, Mapping):
        template = [{"role": role, "content": content} for role, content in template.items()]
    if not isinstance(template, (list, tuple)) or not all(
        isinstance(part, Mapping) and set(part) == {"role", "content"} for part in template
    ):
        raise ConfigError("dataset.template must be a text, a list of {role, content}, or {system: …, user: …}")
    if not template:
        raise ConfigError("dataset.template is empty")
    jinja = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_printed)
    # Jinja's own `tojson` escapes characters for HTML.
    jinja.filters["tojson"] = lambda v, indent=None: json.dumps(v, ensure_ascii=False, indent=indent, default=str)
    parts = []
    for role, text in ((part["role"], part["content"]) for part in template):
        if str(role) not in ROLES:
            raise ConfigError(f"dataset.template: there is no role {role!r:.60}{nearest(str(role), ROLES)}")
        if not isinstance(text, str):
            raise ConfigError(f"dataset.template: the {role} message must be a text, not {_kind(text)}")
        try:
            parts.append((role, jinja.from_string(text)))
        except Exception as error:  # constant expressions are evaluated here, and may raise anything
            where = f"the {role} message, " if len(template) > 1 else ""
            raise ConfigError(f"dataset.template: {where}line {getattr(error, 'lineno', 1)}: {one_line(error)}") from None
    return parts


def _render(parts: list[tuple[str, jinja2.Template]], columns: Mapping[str, Any]) -> list[Any]:
    messages = []
    try:
        for role, template in parts:
            text = template.render({**columns, "row": dict(columns)})
            text.encode()  # a lone surrogate, from an escape in the template, must fail here and not later in the run
            messages.append({"role": role, "content": text})
    except EngineError:
        raise
    except jinja2.UndefinedError as error:
        raise invalid(f"the template failed: {one_line(error)}; this row has {_names(columns)}") from None
    except Exception as error:  # a template may raise any type; the error concerns only this row
        raise invalid(f"the template failed: {type(error).__name__}: {one_line(error)}") from None
    return messages
