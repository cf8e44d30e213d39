"""The tasks of a request: a chat, or one of the tasks that score a text. The only table of them.

A chat gives choices. Every other task gives `Completion.values`, whose names are those of the output's columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engines.errors import EngineError, invalid, must_be, no_such

CHAT = "chat"


@dataclass(frozen=True, slots=True)
class TaskKind:
    """The facts about a task."""

    # The fields of a request that hold its input; one of these groups. `messages` is `Request.messages`, the others are
    # keys of `Request.inputs`.
    inputs: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...] = ()  # the names in `Completion.values`, in the order of the output
    params: frozenset[str] | None = frozenset()  # the generation parameters that apply; None: all except `TASK_PARAMS`
    answer_is_input: bool = False  # the last answer of a conversation belongs to the input
    optional: tuple[str, ...] = ()  # inputs that are an empty text if a row has no column for them


TASKS: dict[str, TaskKind] = {
    CHAT: TaskKind((("messages",),), params=None),
    "embed": TaskKind((("text",),), ("embedding",), frozenset(("dimensions",))),
    "classify": TaskKind((("text",), ("messages",)), ("label", "scores")),
    "score": TaskKind((("query", "text"), ("messages",)), ("score",), answer_is_input=True),
    "rerank": TaskKind((("query", "documents"),), ("ranking",)),
    "loglikelihood": TaskKind(
        (("prompt", "completion"), ("messages",)), ("loglikelihood", "tokens", "perplexity", "token_logprobs"),
        frozenset(("logprobs",)), answer_is_input=True, optional=("prompt",),
    ),
}  # fmt: skip

# The parameters that are not parameters of a chat.
TASK_PARAMS = frozenset(("dimensions",))


def refused_parameter(task: str, given: Iterable[str]) -> str | None:
    """The first of the generation parameters `given` that has no meaning for the task."""
    params = TASKS[task].params
    for name in given:
        if name in TASK_PARAMS if params is None else name not in params:
            return name
    return None


def no_task(task: str, tasks: Collection[str], engine: str) -> str:
    """The message for a task that an engine lacks."""
    return (
        f"engine={engine} does not support task={task} (it supports {', '.join(name for name in TASKS if name in tasks)})"
    )


def check_values(values: Mapping[str, Any]) -> None:
    """Raises `EngineError("bad_response")` for NaN in a value: the model's arithmetic went wrong."""
    for name, value in values.items():
        if _has_nan(value):
            raise EngineError("bad_response", f"the model gave NaN (not a number) in '{name}'")


def _has_nan(value: Any) -> bool:
    if hasattr(value, "dtype"):  # an array; its product with itself is NaN only if one of its numbers is
        product = value.dot(value)
        return bool(product != product)
    if isinstance(value, (list, tuple)):
        return any(map(_has_nan, value))
    if isinstance(value, Mapping):
        return any(map(_has_nan, value.values()))
    return isinstance(value, float) and value != value


def check_inputs(task: Any, messages: list[Any], inputs: Any) -> None:
    """Checks that a request has the input of its task. Raises `EngineError("invalid_input")`."""
    if task not in TASKS:
        raise invalid(no_such("task", str(task), TASKS))
    if not isinstance(inputs, (dict, Mapping)):  # the check for a dict is faster
        raise invalid(must_be("inputs", "an object", inputs))
    given, groups = (*inputs, "messages") if messages else tuple(inputs), TASKS[task].inputs
    if given not in groups and not any(set(given) == set(group) for group in groups):
        ways = " or ".join(" and ".join(group) for group in groups)
        raise invalid(f"task={task} needs {ways}; this row has {', '.join(sorted(given)) or 'nothing'}")
    for name, value in inputs.items():
        if name == "documents":
            if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
                raise invalid(must_be(name, "a list of at least one text", value))
        elif not isinstance(value, str):
            raise invalid(must_be(name, "a text", value))
    if task == "loglikelihood" and messages and messages[-1].get("role") != "assistant":
        raise invalid("task=loglikelihood needs a conversation that ends with an answer")


def task_of(values: Collection[str]) -> str:
    """The task that gives these values (`Completion.values`). A failed request has none and counts as a chat."""
    return next((name for name, kind in TASKS.items() if values and kind.columns[:1] and kind.columns[0] in values), CHAT)


def is_chat(task: str) -> bool:
    return task == CHAT
