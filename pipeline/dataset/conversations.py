"""Converts the conversation of a row to messages in OpenAI's form, for each dataset format. Pure functions."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from engines.errors import invalid, nearest
from engines.params import GENERATION_FIELDS
from engines.tasks import CHAT
from pipeline.dataset.task_inputs import body_inputs, url_task
from pipeline.dataset.values import json_value, kind_word, text_value


@dataclass(frozen=True, slots=True)
class Body:
    """The body of an OpenAI batch file's line."""

    messages: list[Any]
    generation: dict[str, Any]
    model: str | None
    extra: dict[str, Any]  # fields that Eagleray has no name for
    task: str = CHAT
    inputs: dict[str, Any] = field(default_factory=dict)  # of a task other than a chat


# Fields of a body that are read below, or that the engine sets itself (`stream`).
_READ = frozenset(
    ("messages", "model", "system", "max_completion_tokens", "top_logprobs", "functions", "function_call", "stream",
     "stream_options", *GENERATION_FIELDS)
)  # fmt: skip


def from_body(body: dict[str, Any], columns: Mapping[str, Any], task: str = CHAT) -> Body:
    """Reads a body. A `system` text, as in Anthropic's API, becomes the first message; `functions` become tools.

    The line's `url` names the task; otherwise it is `task`.
    """
    messages = json_value(body.get("messages"), "body.messages")
    task = url_task(columns.get("url"), task)
    inputs, read = dict[str, Any](), set[str]()
    if task != CHAT and messages is None:
        task, inputs, read = body_inputs(task, body)
        messages = []
    if messages is None:
        url = columns.get("url")
        raise invalid(f"body has no messages{f' (its url is {url!r:.80})' if url else ''}")
    generation = {name: body[name] for name in GENERATION_FIELDS if body.get(name) is not None and name not in read}
    limit = body.get("max_completion_tokens")
    if limit is not None:
        generation["max_tokens"] = limit
    # In chat completions, `logprobs` is a switch, and `top_logprobs` the number.
    if isinstance(generation.get("logprobs"), bool) and generation.pop("logprobs"):
        generation["logprobs"] = body.get("top_logprobs") or 0
    _add_functions(body, generation)
    if isinstance(messages, list):
        messages = with_system(from_oumi(messages, drop_ids=False), body.get("system"), "body.system")
    model = body.get("model")
    extra = {name: value for name, value in body.items() if name not in _READ | read and value is not None}
    return Body(messages, generation, model if isinstance(model, str) and model else None, extra, task, inputs)


def _add_functions(body: Mapping[str, Any], generation: dict[str, Any]) -> None:
    """Adds `functions` and `function_call`, OpenAI's form before 2023-11, as `tools` and `tool_choice`."""
    functions, choice = body.get("functions"), body.get("function_call")
    if functions:
        given = json_value(functions, "body.functions", list)
        generation.setdefault("tools", [{"type": "function", "function": function} for function in given])
    if choice:
        wrapped = choice if isinstance(choice, str) else {"type": "function", "function": choice}
        generation.setdefault("tool_choice", wrapped)


def with_system(messages: list[Any], system: Any, what: str) -> list[Any]:
    """The messages with a system message from beside them: a text, or a list of content parts.

    Raises `EngineError("invalid_input")` if the messages begin with a different system message.
    """
    if not system:
        return messages
    content = system if isinstance(system, list) else text_value(system, what)
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": content}, *messages]
    if first.get("content") != content:
        raise invalid(f"the messages begin with a system message, and {what} has another one")
    return messages


def from_oumi(messages: list[Any], drop_ids: bool) -> list[Any]:
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


def from_sharegpt(turns: list[Any]) -> list[Any]:
    """Converts `from`/`value` turns to messages. A function call and the observation after it get the same id."""
    messages: list[Any] = []
    waiting: list[str] = []  # ids of calls that have no observation yet
    calls = itertools.count()
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise invalid(f"conversations[{i}] must be an object, not {kind_word(turn)}")
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
            message = {"role": role, "content": text_value(value, f"conversations[{i}].value")}
            if role == "tool" and waiting:
                message["tool_call_id"] = waiting.pop(0)
        messages.append(message)
    return messages


def _function_call(value: Any, i: int, calls: Iterator[int]) -> dict[str, Any]:
    given = json_value(value, f"conversations[{i}].value")
    tool_calls = []
    for call in given if isinstance(given, list) and given else [given]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise invalid(f"conversations[{i}].value must be a function call with a 'name'")
        arguments = call.get("arguments", call.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        function = {"name": call["name"], "arguments": text}
        tool_calls.append({"id": f"call_{next(calls)}", "type": "function", "function": function})
    return {"role": "assistant", "content": None, "tool_calls": tool_calls}
