"""Prepares a row for the report: its turns as plain text, cut to a bounded size."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from engines.text import counted, visible
from engines.types import answer, called
from pipeline.report.task_values import values_of, values_text
from pipeline.storage.exact_json import dumps, loads

# Limits in characters of one text and of a whole row. The answer uses the limit of the row before the other messages do.
TEXT_CHARS, ROW_CHARS = 4_000, 12_000
# A longer conversation is shown without its middle.
FIRST_TURNS, LAST_TURNS = 4, 16
LEFT_OUT = re.compile(r" ⋯ [\d,]+ characters? left out here ⋯ ")
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?[;,]")

Turn = dict[str, Any]


class _Cutter:
    """Cuts texts so that all texts of a row together stay within `ROW_CHARS`."""

    def __init__(self) -> None:
        self.left = ROW_CHARS

    def __call__(self, text: Any, limit: int = TEXT_CHARS) -> str:
        text = text if isinstance(text, str) else _json(text)
        take = min(limit, self.left)
        self.left -= min(len(text), take)
        if len(text) <= take:
            return visible(text)
        # The beginnings of prompts are often equal, so a long text is shown with its end.
        head = take * 2 // 3
        left_out = f" ⋯ {counted(len(text) - take, 'character')} left out here ⋯ "
        return visible(text[:head]) + left_out + visible(text[len(text) - (take - head) :])


def shown_row(
    id: str, index: int, messages: bytes | None, raw: bytes | None, columns: Any, completion: Mapping[str, Any],
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The data that the page needs to draw one row. `completion` has our columns. `inputs` are those of a task other than a
    chat. `columns` are those of the input, for a row without a readable conversation."""
    cut = _Cutter()
    error, usage = completion["error"], completion["usage"]
    row = {
        "id": cut(id, 200),
        "index": index,
        "finish": completion["finish_reason"],
        "model": completion["model"] and cut(completion["model"], 200),
        "attempts": completion["attempts"],
        "latency": completion["latency_s"] or None,
        "queued": completion["queued_s"],
        "usage": usage and [usage["input"], usage["cached_input"], usage["output"]],
        "error": error and {"type": error["type"], "status": error["status"], "message": cut(error["message"], 1000)},
    }
    answers = [] if error else list(_answers(completion, cut))
    if messages is not None:
        conversation = loads(messages)
        if (skipped := len(conversation) - FIRST_TURNS - LAST_TURNS) > 0:
            del conversation[FIRST_TURNS:-LAST_TURNS]
        turns = [_turn(message, cut) for message in conversation]
        if skipped > 0:
            note = {"kind": "note", "text": f"{counted(skipped, 'message is', 'messages are')} left out here"}
            turns.insert(FIRST_TURNS, {"role": "note", "parts": [note]})
    elif inputs:
        turns = [_input(name, value, cut, alone=len(inputs) == 1) for name, value in inputs.items()]
    else:
        line = raw.decode("utf-8", "replace") if raw else _json(dict(columns or {}))
        turns = [{"role": "input", "parts": [{"kind": "code", "text": cut(line)}]}]
    return {**row, "turns": turns + answers}


def _input(name: str, value: Any, cut: _Cutter, *, alone: bool) -> Turn:
    """A turn for an input. If it is not alone, its name comes first."""
    text = value if isinstance(value, str) else "\n".join(f"{at}: {each}" for at, each in enumerate(value))
    before = "" if alone else f"{name}:{' ' if isinstance(value, str) else chr(10)}"
    return {"role": "input", "parts": [{"kind": "text", "text": cut(before + text)}]}


def _answers(completion: Mapping[str, Any], cut: _Cutter) -> Iterator[Turn]:
    """A turn for the answer, for each of several answers (`n`), or for the values of another task."""
    if values := values_of(completion):
        yield {"role": "assistant", "parts": [{"kind": "text", "text": cut(values_text(values))}], "answer": True}
        return
    choices = loads(completion["choices"].encode()) if completion["choices"] else [None]
    for number, choice in enumerate(choices, 1):
        if choice:
            turn = _turn({**choice["message"], "reasoning": completion["reasoning"] if number == 1 else None}, cut)
            turn["note"] = f"{number} of {len(choices)}, {choice['finish_reason']}"
        else:
            calls = completion["tool_calls"] and loads(completion["tool_calls"].encode())
            message = answer(completion["response"], calls)
            turn = _turn({**message, "reasoning": completion["reasoning"]}, cut)
        yield {**turn, "answer": True, "parts": turn["parts"] or [{"kind": "note", "text": "an empty answer"}]}


def _turn(message: Mapping[str, Any], cut: _Cutter) -> Turn:
    parts = []
    if reasoning := message.get("reasoning_content") or message.get("reasoning"):
        parts.append({"kind": "reasoning", "text": cut(reasoning)})
    content = message.get("content")
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []:
        parts.append(_part(part, cut))
    calls = message.get("tool_calls")
    parts += [_call(call, cut) for call in calls] if isinstance(calls, list) else []
    return {"role": cut(message.get("role"), 40), "parts": parts}


def _part(part: Any, cut: _Cutter) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"kind": "text", "text": cut(part.get("text"))}
    if kind == "image_url":
        url = part.get("image_url")
        return {"kind": "image", "text": cut(_image_label(url.get("url") if isinstance(url, dict) else url), 200)}
    return {"kind": "other", "text": cut(kind, 100)}


def _image_label(url: Any) -> str:
    """The text of an image's placeholder: type and size of a data URL, or a URL without its query (maybe a signature)."""
    text = str(url)
    if match := _DATA_URL.match(text):
        size = (len(text) - match.end()) * 3 // 4
        return f"{match[1] or 'image'}, {size // 1024:,} KiB" if size >= 1024 else f"{match[1] or 'image'}, {size} bytes"
    return re.split(r"[?#]", text, maxsplit=1)[0]


def _call(call: Any, cut: _Cutter) -> dict[str, str]:
    if not isinstance(call, dict):
        return {"kind": "code", "text": cut(call)}
    name, given = called(call)
    return {"kind": "call", "name": cut(name, 200), "text": cut(given)}


def _json(value: Any) -> str:
    return dumps(value).decode() if value is not None else ""
