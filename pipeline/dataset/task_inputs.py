"""Reads the input of a task other than a chat: the columns of a row, or the body of a line of an OpenAI batch file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.errors import ConfigError, invalid
from engines.tasks import CHAT, TASKS
from pipeline.dataset.values import column_names, from_arrow, json_value, kind_word, text_value

# The roles of columns with the inputs of tasks.
INPUT_ROLES = tuple(dict.fromkeys(
    name for kind in TASKS.values() for group in kind.inputs for name in group if name != "messages"
))  # fmt: skip
# The names of columns with an input that nobody named, in the order of the search. Other inputs have their own name.
_USUAL = {"text": ("text", "input")}


class InputColumns:
    """The columns that hold the input of a task. Raises `ConfigError` for roles that the task does not read together."""

    def __init__(self, task: str, roles: Mapping[str, str | None]) -> None:
        self.task = task
        self.groups = [group for group in TASKS[task].inputs if group != ("messages",)]
        self.mapped = {role: column for role, column in roles.items() if role in INPUT_ROLES and column is not None}
        self.off = {role for role, column in roles.items() if column is None}
        self.takes_messages = ("messages",) in TASKS[task].inputs
        if self.mapped.keys() == {"prompt"} and "prompt" not in self.names:
            self.mapped = {}  # the column of a conversation
        if self.mapped:
            self.groups = [group for group in self.groups if self.mapped.keys() <= set(group)]
            if not self.groups:
                names = " and ".join(f"dataset.columns.{role}" for role in self.mapped)
                raise ConfigError(f"task={task} does not read {names}; it reads {self.ways()}", key="dataset.columns")

    @property
    def names(self) -> set[str]:
        """The inputs that columns may hold."""
        return {name for group in self.groups for name in group}

    def is_conversation(self, role: str) -> bool:
        """True if a column with this role holds a conversation that is an input of the task."""
        return self.takes_messages and role in ("messages", "conversations", "prompt") and role not in self.names

    def ways(self) -> str:
        """The inputs of the task in words."""
        return " or ".join(" and ".join(group) for group in TASKS[self.task].inputs)

    @property
    def has_text(self) -> bool:
        """True if the input may be one text, such as that of a template."""
        return ("text",) in self.groups

    def find(self, columns: Mapping[str, Any]) -> dict[str, str]:
        """Input -> its column, for the first group whose columns are all there. Empty if there is none.

        An optional input without a column of its name is left out.
        """
        for group in self.groups:
            absent = {role for role in TASKS[self.task].optional if not any(name in columns for name in self._names(role))}
            found = {role: self._column(role, columns) for role in group if role not in absent}
            if all(found.values()):
                return {role: name for role, name in found.items() if name is not None}
        return {}

    def _names(self, role: str) -> tuple[str, ...]:
        if role in self.mapped:
            return (self.mapped[role],)
        return () if role in self.off else _USUAL.get(role, (role,))

    def _column(self, role: str, columns: Mapping[str, Any]) -> str | None:
        names = self._names(role)
        return next((name for name in names if columns.get(name) is not None), None)

    def read(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a row. Raises `EngineError("invalid_input")`."""
        if not (found := self.find(columns)):
            raise invalid(self._missing(columns))
        return dict.fromkeys(TASKS[self.task].optional, "") | {
            role: _documents(columns[name]) if role == "documents" else text_value(columns[name], f"the column '{name}'")
            for role, name in found.items()
        }

    def _missing(self, columns: Mapping[str, Any]) -> str:
        for role, name in self.mapped.items():
            if name in columns:
                return f"the column '{name}' (dataset.columns.{role}) is null"
        role = self.groups[0][0] if self.groups else "messages"
        for name in self._names(role):
            if name in columns and columns[name] is None:
                return f"the column '{name}' is null"
        texts = [str(name) for name, value in columns.items() if isinstance(value, str)]
        example = texts[0] if len(texts) == 1 else "COLUMN"
        keys = " ".join(f"dataset.columns.{each}={example}" for each in (self.groups[0] if self.groups else (role,)))
        return (
            f"task={self.task} needs {self.ways()}; the row has the columns {column_names(columns)} (to name them: {keys})"
        )


def _documents(value: Any) -> list[str]:
    """Texts, or objects with a `text`."""
    given = from_arrow(json_value(value, "documents", list))
    return [text_value(each.get("text") if isinstance(each, dict) else each, f"documents[{at}]")
            for at, each in enumerate(given)]  # fmt: skip


# -- lines of OpenAI batch files ------------------------------------------------------------------------------------------

# The end of a line's `url` -> its task. `/v1/chat/completions` is a chat.
_TASKS_OF_URLS = {
    "embeddings": "embed", "classify": "classify", "score": "score", "rerank": "rerank", "completions": "loglikelihood",
}  # fmt: skip
# The fields of the bodies that are read below. Those in `_IGNORED` change only the form of the answer.
_QUERY = ("text_1", "query", "queries", "data_1")
_TEXT = ("text_2", "text", "documents", "items", "data_2")
_IGNORED = ("encoding_format", "top_n", "return_documents")
# What a request of log probabilities must have in a body for `/v1/completions`.
_ECHO = {"echo": True, "max_tokens": 0}


def url_task(url: Any, task: str) -> str:
    """The task of a line by its `url`. `task` is that of lines whose url names none."""
    if not isinstance(url, str):
        return task
    path = url.partition("?")[0].rstrip("/")
    return CHAT if path.endswith("chat/completions") else _TASKS_OF_URLS.get(path.rpartition("/")[2], task)


def body_inputs(task: str, body: Mapping[str, Any]) -> tuple[str, dict[str, Any], set[str]]:
    """The task and the inputs of a body without messages, and the names of the fields that were read.

    A `score` of one query and several texts is a `rerank`. Raises `EngineError("invalid_input")`.
    """
    return _BODIES[task](task, body)


def _text_of_body(task: str, body: Mapping[str, Any]) -> tuple[str, dict[str, Any], set[str]]:
    return task, {"text": _one(body, ("input", "text"))}, {"input", "text", *_IGNORED}


def _likelihood_of_body(task: str, body: Mapping[str, Any]) -> tuple[str, dict[str, Any], set[str]]:
    if "completion" in body:
        return task, {name: _one(body, (name,)) for name in ("prompt", "completion")}, {"prompt", "completion"}
    if any(body.get(name) != value for name, value in _ECHO.items()):
        raise invalid(
            "a line for /v1/completions asks to continue a plain text, which no engine does: use /v1/chat/completions "
            "(echo=true with max_tokens=0 asks for the log likelihood of the text)"
        )
    return task, {"prompt": "", "completion": _one(body, ("prompt",))}, {"prompt", *_ECHO}


def _query_of_body(task: str, body: Mapping[str, Any]) -> tuple[str, dict[str, Any], set[str]]:
    query, field = _one(body, _QUERY), _given(body, _TEXT)
    several = isinstance(body[field], list) and len(body[field]) > 1
    if several or ("query", "documents") in TASKS[task].inputs:
        return "rerank", {"query": query, "documents": _documents(body[field])}, {*_QUERY, *_TEXT, *_IGNORED}
    return task, {"query": query, "text": _one(body, (field,))}, {*_QUERY, *_TEXT, *_IGNORED}


_BODIES = {
    "embed": _text_of_body, "classify": _text_of_body, "score": _query_of_body, "rerank": _query_of_body,
    "loglikelihood": _likelihood_of_body,
}  # fmt: skip


def _given(body: Mapping[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        if body.get(name) is not None:
            return name
    raise invalid(f"body has no {' or '.join(names)}")


def _one(body: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The text in the first of these fields that the body has: a text, or a list of one."""
    name = _given(body, names)
    value = body[name]
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], str):
            what = f"{len(value):,} texts" if all(isinstance(each, str) for each in value) else "something other than texts"
            raise invalid(f"body.{name} is a list of {what}: write one text a line")
        value = value[0]
    if not isinstance(value, str):
        raise invalid(f"body.{name} must be text, not {kind_word(value)}")
    return value
