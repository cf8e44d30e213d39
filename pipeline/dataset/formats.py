"""Converts an input row to a request: finds the columns with a meaning, and reads the conversation and its settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from engines.errors import ConfigError, ErrorCode, invalid, must_be, nearest, no_such
from engines.params import GENERATION_FIELDS
from engines.tasks import CHAT, TASKS, check_inputs
from engines.types import ROLES, Message, check_messages, text_of
from pipeline.config import Config
from pipeline.dataset.column_types import input_name
from pipeline.dataset.conversations import from_body, from_oumi, from_sharegpt, with_system
from pipeline.dataset.task_inputs import INPUT_ROLES, InputColumns
from pipeline.dataset.templates import Template, template_text
from pipeline.dataset.values import column_names, from_arrow, from_text, json_value, kind_word, starts_like, text_value
from pipeline.storage.exact_json import dumps
from pipeline.storage.ledger import COMPLETION_COLUMNS, LEDGER_ONLY

# The roles of columns. Every generation parameter is a role too, for a mapped column only.
# fmt: off
COLUMN_ROLES = (
    "id", "messages", "conversations", "body", "prompt", "turns", "system", "model", "adapter", "generation", "tools",
)
# fmt: on
_ALL_ROLES = frozenset((*COLUMN_ROLES, *INPUT_ROLES, *GENERATION_FIELDS))
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

# Names that are Eagleray's in data/. A column of the input with one of these names becomes `input_<name>` there.
OUTPUT_COLUMNS = ("id", "index", "messages", *(name for name in COMPLETION_COLUMNS if name not in LEDGER_ONLY))
# The column with last answers that were not sent. It exists only if there are some, because many tables have one like it.
REFERENCE = "reference"
# A table with all of these columns is a data/ file of Eagleray: an earlier run wrote its `model`, `messages` and so on.
_OURS = frozenset(("id", "index", "response", "messages", "finish_reason", "model", "engine", "attempts", "error"))
_ERROR_FIELDS = frozenset(("type", "message", "status", "retryable"))


class ArrowRow(dict[str, Any]):
    """A row of a Parquet file. Its nested values come from Arrow structs, which have a null for every absent field."""


class TextRow(dict[str, Any]):
    """A row of a CSV file. Its values are texts and nulls."""


@dataclass(slots=True)
class Parsed:
    """The request in a row. `generation`, `model` and `adapter` override those of the run."""

    messages: list[Message]
    id: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    adapter: str | None = None
    turns: list[Any] = field(default_factory=list)  # the user's later messages, each sent after an answer
    extra_body: dict[str, Any] = field(default_factory=dict)  # fields of a body that Eagleray has no name for
    reference: str | None = None  # the last answer, which is not sent (`dataset.last_answer=drop`)
    continue_answer: bool = False  # the last message is the beginning of the answer
    task: str = CHAT
    inputs: dict[str, Any] = field(default_factory=dict)  # of a task other than a chat: see `TaskKind.inputs`
    only_text: bool = False  # True: each message has a text and no other content. False: not known


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, bytes))


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or starts_like(value, "[")


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) or starts_like(value, "{")


def _has_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


# Whether a column that nobody named has the meaning of its name. A `model` of 3, a `generation` that is a text, or `tools`
# that are a list of words is data.
_FITS: dict[str, Callable[[Any], bool]] = {
    "messages": _is_list,
    "conversations": _is_list,
    "body": _is_object,
    "prompt": lambda value: _is_text(value) or isinstance(value, list),
    "turns": _is_list,
    "system": lambda value: _is_text(value) or _has_objects(value),
    "model": _is_text,
    "adapter": _is_text,
    "generation": _is_object,
    "tools": lambda value: _has_objects(value) or starts_like(value, "[") or _is_object(value),
}


# Names of columns that may hold the text to ask, in the order in which the hint prefers them.
_TEXT_NAMES = ("question", "text", "content", "body", "instruction", "query", "input", "message")


def _text_column(columns: Mapping[str, Any]) -> str | None:
    """The column that seems to hold the text to ask: one of `_TEXT_NAMES`, or the only column with a text."""
    texts = {str(name).lower(): str(name) for name in columns if isinstance(columns[name], str)}
    known = next((texts[name] for name in _TEXT_NAMES if name in texts), None)
    return known or (next(iter(texts.values())) if len(texts) == 1 else None)


class RowParser:
    """Parses rows into conversations. Small and picklable: built once for each task.

    Raises `ConfigError` for an invalid format, column role or template.
    """

    def __init__(
        self, format: str = "auto", columns: Mapping[str, str | None] | None = None, template: Any = None,
        last_answer: str = "drop", task: str = CHAT,
    ) -> None:  # fmt: skip
        if format not in FORMATS:
            raise ConfigError(f"dataset.format: {no_such('format', format, FORMATS)}", key="dataset.format")
        self.format, self.given, self.last_answer, self.task = format, dict(columns or {}), last_answer, task
        self.template = template_text(template)
        for role, column in self.given.items():
            if role not in _ALL_ROLES:
                raise ConfigError(f"dataset.columns: {no_such('role', role, _ALL_ROLES)}", key="dataset.columns")
            if column is not None and (not isinstance(column, str) or not column):
                raise ConfigError(
                    must_be(f"dataset.columns.{role}", "the name of a column or null", column, 60), key="dataset.columns"
                )
        self.columns = {role: column for role, column in self.given.items() if column is not None}
        off = self.given.keys() - self.columns.keys()
        self.inputs = InputColumns(task, self.given)
        named = self.inputs.mapped if task != CHAT else {}
        mapped = tuple(role for role in _CONTENT if role in self.columns and role not in named)
        if mapped and template is not None:
            raise ConfigError(
                f"dataset.template and dataset.columns.{mapped[0]} both say where the conversation is",
                key="dataset.template",
            )
        # The roles of the columns that may hold the conversation, in the order of the search.
        usual = _CONTENT if format == "auto" else (_SOURCE[format],)
        if task != CHAT:
            usual = tuple(role for role in usual if role == "body" or self.inputs.is_conversation(role))
        for role in mapped:
            if role not in usual:
                of_task = "" if task == CHAT else f" and task={task}"
                raise ConfigError(
                    f"dataset.columns.{role} is not read with dataset.format={format}{of_task}", key="dataset.columns"
                )
        self.order = () if template is not None else mapped or tuple(role for role in usual if role not in off)
        if named:
            self.order = ()
        if not self.order and template is None and task == CHAT:
            raise ConfigError(
                f"dataset.columns.{usual[0]}=null leaves no column that can hold a conversation", key="dataset.columns"
            )
        self._template = Template(self.template) if template is not None else None
        self._fields = [role for role in self.columns if role in GENERATION_FIELDS and role != "tools"]
        self._id_columns = (self.columns["id"],) if "id" in self.columns else () if "id" in off else _IDS
        # The roles that columns have by their own names. None of them, if the user names the column of the conversation.
        others = ("system", "model", "adapter", "generation", "tools")
        own = () if mapped or named or template is not None else (*self.order, *others)
        self._own = frozenset(own) - self.columns.keys() - off - (set() if task == CHAT else {"tools"})
        self._guessed = self._own - (set() if format == "auto" else set(self.order))  # special only if the value fits
        self._names = {**{role: role for role in self._own}, **self.columns}  # role -> column
        # The columns that have settings of a row beside its conversation.
        self._settings = frozenset(
            self._names[role] for role in ("tools", "generation", "model", "adapter", *self._fields) if role in self._names
        )
        # See `_plain_messages`. In data/ that we wrote, there is a column `engine`.
        can_be_plain = task == CHAT and not self.columns and self.order[:1] == ("messages",) and format != "oumi"
        self._not_plain = frozenset((*self._own - {"messages"}, "engine", "conversation_id")) if can_be_plain else None

    @classmethod
    def of(cls, config: Config) -> RowParser:
        """The parser of a configuration."""
        dataset = config.dataset
        return cls(dataset.format, dataset.columns, dataset.template, dataset.last_answer, config.task)

    def __reduce__(self) -> Any:  # compiled templates do not pickle
        return RowParser, (self.format, self.given, self.template, self.last_answer, self.task)

    def parse(self, columns: dict[str, Any]) -> Parsed:
        """The conversation in a row. Does not change the row. Raises `EngineError("invalid_input")` with the reason."""
        if (plain := self._plain_messages(columns)) is not None:
            parsed = Parsed(plain, id=self.id_of(columns), only_text=True)
            self._apply_last_answer(parsed, ours=False)
            return parsed
        for role, name in self.columns.items():
            if name not in columns:
                raise invalid(f"there is no column '{name}' (dataset.columns.{role}) among {column_names(columns)}")
        ours = "engine" in columns and columns.keys() >= _OURS
        parsed = Parsed([], id=self.id_of(columns), task=self.task)
        messages = self._from_template(columns, parsed) if self._template else self._messages(columns, ours, parsed)
        if not parsed.inputs:
            if system := self._get(columns, "system"):
                messages = with_system(messages, system, self._called("system"))
            parsed.messages = check_messages(messages)
        if not self._settings.isdisjoint(columns):  # not in most rows
            self._overrides(columns, ours, parsed)
        if parsed.messages and not TASKS[parsed.task].answer_is_input:
            self._apply_last_answer(parsed, ours)
        if parsed.task != CHAT:
            check_inputs(parsed.task, parsed.messages, parsed.inputs)
        return parsed

    def _plain_messages(self, columns: Mapping[str, Any]) -> list[Any] | None:
        """The messages of a row that has only messages with a text each, as most rows have: the short way to the same
        result. None if the row may have more than that."""
        if self._not_plain is None or not self._not_plain.isdisjoint(columns):
            return None
        messages = columns.get("messages")
        if type(messages) is not list or not messages:
            return None
        from_arrow = type(columns) is ArrowRow  # then further fields may be nulls that Arrow added
        for message in messages:
            if type(message) is not dict or type(message.get("content")) is not str or (from_arrow and len(message) > 2):
                return None
            role = message.get("role")
            if type(role) is not str or role not in ROLES or "function_call" in message:
                return None
        return messages

    def _from_template(self, columns: Mapping[str, Any], parsed: Parsed) -> list[Any]:
        """The messages that the template renders, or its text if the task has a text and the template is one message."""
        assert self._template is not None
        messages = self._template.render(columns)
        if self.task != CHAT and self.inputs.has_text and len(messages) == 1:
            parsed.inputs = {"text": messages[0]["content"]}
            return []
        return messages

    def id_of(self, columns: Mapping[str, Any]) -> str | None:
        """The row's own id as text; None if it has none."""
        for name in self._id_columns:
            value = columns.get(name)
            if value is None or value == "" or value != value:  # a missing number of pandas is NaN
                continue
            if isinstance(value, (dict, list)):
                return json.dumps(value, default=str)
            return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
        return None

    def takes(self, name: str, kind: pa.DataType | None) -> bool:
        """True if this column of the input is read as the rows' id or messages. `kind` is its Arrow type, if known."""
        if name == "id":
            return name in self._id_columns
        return "messages" in self.order and self.columns.get("messages", "messages") == name and _may_be_list(kind)

    def special_columns(self, columns: Mapping[str, Any]) -> dict[str, str]:
        """Role -> column, for each column of this row that has a meaning. All other columns are data."""
        found = {"id": next((name for name in self._id_columns if columns.get(name) not in (None, "")), None)}
        content = self._content_role(columns)
        if self.task != CHAT and content is None and self._template is None:
            found |= self.inputs.find(columns)
        for role in (content, "system", "model", "adapter", "generation", "tools", *self._fields):
            if role is not None and self._get(columns, role) not in (None, "", []):
                found[role] = self._names[role]
        return {role: name for role, name in found.items() if name is not None}

    def _get(self, columns: Mapping[str, Any], role: str) -> Any:
        """The value of the column with this role. None if there is no such column, or if an unnamed one holds data."""
        name = self._names.get(role)
        value = None if name is None else columns.get(name)
        if value is None or (role in self._guessed and not _FITS[role](value)):
            return None
        return value if type(value) is str or type(columns) is not ArrowRow else from_arrow(value)

    def _content_role(self, columns: Mapping[str, Any]) -> str | None:
        """The role of the column that holds the conversation. None if there is none, or if a template builds it.

        If no value fits the name of its column, the first column that is there: parsing it says what is wrong.
        """
        first = None
        for role in self.order:
            value = columns.get(self._names[role])
            if value is not None:
                if role not in self._guessed or _FITS[role](value):
                    return role
                first = first or role
        return first if self.task == CHAT else None

    def _messages(self, columns: Mapping[str, Any], ours: bool, parsed: Parsed) -> list[Any]:
        role = self._content_role(columns)
        # A failed row that we wrote for a batch file has `body` and `messages`. Only `body` has everything.
        if ours and "body" in self.order and columns.get(self._names["body"]) is not None:
            role = "body"
        if role is None and self.task != CHAT:
            parsed.inputs = self.inputs.read(columns)
            return []
        if role is None:
            first = self.order[0]
            if first in self.columns:
                raise invalid(f"the column '{self.columns[first]}' (dataset.columns.{first}) is null")
            if empty := [name for name in self.order if name in columns]:
                raise invalid(
                    f"the column{'s' * (len(empty) > 1)} {' and '.join(map(repr, empty))} "
                    f"{'are' if len(empty) > 1 else 'is'} null"
                )
            wanted = " or ".join([", ".join(self.order[:-1]), self.order[-1]] if self.order[1:] else self.order)
            way = "map one with dataset.columns or dataset.template"
            if "prompt" in self.order and (text := _text_column(columns)):
                way = (
                    f"to ask the text in '{text}': dataset.columns.prompt={text}; to ask several columns: dataset.template"
                )
            raise invalid(f"no {wanted} among the columns {column_names(columns)} ({way})")
        value = columns[self._names[role]]
        if type(columns) is ArrowRow and not _is_text(value):
            value = from_arrow(value)
        if role == "body":
            if self.format == "auto" and "body" not in self.columns and _is_text(value) and not starts_like(value, "{"):
                raise invalid("body is text, not a request in JSON; to ask this text: dataset.columns.prompt=body")
            body = from_body(json_value(value, "body", dict), columns, self.task)
            parsed.generation, parsed.model, parsed.extra_body = body.generation, body.model, body.extra
            parsed.task, parsed.inputs = body.task, body.inputs
            return body.messages
        if role == "prompt" and not isinstance(value, list):  # in preference datasets, `prompt` is a list of messages
            return [{"role": "user", "content": text_value(value, "prompt")}]
        if role == "turns":
            return _first_turn(json_value(value, "turns", list), parsed)
        if role == "conversations":
            return from_sharegpt(json_value(value, role, list))
        oumi = self.format == "oumi" or (self.format == "auto" and columns.get("conversation_id") is not None)
        return from_oumi(json_value(value, role, list), drop_ids=oumi)

    def _called(self, role: str) -> str:
        """The column of a role in an error message, with the key that makes it data if nobody named it."""
        hint = f" (dataset.columns.{role}=null makes it data)" if role in self._own else ""
        return f"the column '{self.columns.get(role, role)}'{hint}"

    def _overrides(self, columns: Mapping[str, Any], ours: bool, parsed: Parsed) -> None:
        generation = parsed.generation
        if (tools := self._get(columns, "tools")) and (tools := json_value(tools, self._called("tools"), list)):
            generation["tools"] = tools
        if own := self._get(columns, "generation"):
            own = json_value(own, self._called("generation"), dict)
            for name in own.keys() - set(GENERATION_FIELDS):
                known = nearest(str(name), GENERATION_FIELDS)
                text = f"{self._called('generation')} has '{name}', which is not a generation parameter{known}"
                raise invalid(text, code=ErrorCode.UNKNOWN_PARAMETER)
            generation.update(own)
        for role in self._fields:
            if (value := self._get(columns, role)) is not None:
                generation[role] = from_text(value) if type(columns) is TextRow else value
        # In a data/ file that we wrote, `model` is the model that answered. The row's own is in `input_model`.
        model = columns.get("input_model") if ours and "model" in self._own else self._get(columns, "model")
        parsed.model = self._name(model, "model") or parsed.model
        parsed.adapter = self._name(self._get(columns, "adapter"), "adapter") or parsed.adapter

    def _name(self, value: Any, role: str) -> str | None:
        """The name of a model or adapter. None if an unmapped column of that name holds something other than text."""
        if isinstance(value, str) and value:
            return value
        if value and role in self.columns:
            raise invalid(
                f"the column '{self.columns[role]}' (dataset.columns.{role}) must hold text, not {kind_word(value)}"
            )
        return None

    def _apply_last_answer(self, parsed: Parsed, ours: bool) -> None:
        """Removes or marks an answer at the end of the conversation (`dataset.last_answer`)."""
        if parsed.messages[-1]["role"] != "assistant" or self.last_answer == "keep":
            return
        kept = len(parsed.messages)
        while kept and parsed.messages[kept - 1]["role"] == "assistant":
            kept -= 1
        answers = parsed.messages[kept:]
        if self.last_answer == "continue":
            beginning = text_of(answers[-1])
            if beginning is None or answers[-1].get("tool_calls"):
                raise invalid("the last message cannot be continued: it has tool calls or no text")
            parsed.continue_answer = bool(beginning)
            if not beginning:
                parsed.messages = parsed.messages[:-1]
        else:
            parsed.messages = parsed.messages[:kept]
            # In a data/ file that we wrote, the last answer is that of an earlier run.
            parsed.reference = None if ours else _as_text(answers)
        if not parsed.messages:
            raise invalid(f"no message is left without the last answer (dataset.last_answer={self.last_answer})")


def _may_be_list(kind: pa.DataType | None) -> bool:
    """False for an Arrow type, such as a number, that holds neither lists nor JSON text."""
    is_a = pa.types
    lists = (is_a.is_list, is_a.is_large_list, is_a.is_string, is_a.is_large_string, is_a.is_binary, is_a.is_null)
    return kind is None or any(test(kind) for test in lists)


def _as_text(answers: list[Message]) -> str:
    """The text of an answer; the JSON of its messages if it has several, or tool calls or other content."""
    content = answers[0].get("content")
    if len(answers) == 1 and isinstance(content, str) and not answers[0].get("tool_calls"):
        return content
    return dumps(answers).decode()


def _first_turn(turns: list[Any], parsed: Parsed) -> list[Any]:
    """The first user message of a row with `turns`; the later ones go into `parsed.turns`."""
    if not turns:
        raise invalid("turns is empty")
    for at, turn in enumerate(turns):
        if not turn or not isinstance(turn, (str, list)):
            raise invalid(f"turns[{at}] must be text, or a list of content parts")
        check_messages([{"role": "user", "content": turn}])
    parsed.turns = turns[1:]
    return [{"role": "user", "content": turns[0]}]


def passthrough_names(columns: Iterable[str], parser: RowParser, scores: Collection[str] = ()) -> dict[str, str]:
    """Maps each input column that passes through to its name in the output.

    The columns that `parser` reads as id and messages do not pass: our columns of these names hold their values. Any other
    column with one of our names, or with a name in `scores` (further columns of the output), becomes `input_<name>`. If the
    input is a data/ file that we wrote, none of our columns pass, because they are written again. In an errors/ file that
    we wrote, only `error` does not pass. It is recognized by its fields, which needs `columns` to map names to Arrow types.
    """
    names = list(columns)
    if set(names) >= _OURS:
        dropped = set(OUTPUT_COLUMNS)
    else:
        kinds = columns if isinstance(columns, Mapping) else {}
        dropped = {name for name in ("id", "messages") if parser.takes(name, kinds.get(name))}
    error = columns.get("error") if isinstance(columns, Mapping) else None
    if isinstance(error, pa.StructType) and {part.name for part in error} == _ERROR_FIELDS:
        dropped.add("error")
    out = {name: name for name in names if name not in dropped}
    for name in out:
        if name in OUTPUT_COLUMNS or name in scores:
            out[name] = input_name(name, {*out, *scores})
    return out
