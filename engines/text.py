"""What engines that run a model themselves share: checking their keywords, and text into and out of a model."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from engines.errors import ConfigError, must_be, unknown_kwarg
from engines.types import Message, ToolCall, text_of
from engines.validation import TYPE_WORDS, at_least, check_value


def check_kwargs(
    kind: str, kwargs: Mapping[str, Any], types: Mapping[str, Any], positive: Collection[str] = ()
) -> dict[str, Any]:
    """The keywords somebody set, each of its type; `object` takes anything, and those in `positive` are at least 1.

    Raises `ConfigError`, for an unknown keyword with the nearest right one.
    """
    checked = {}
    for name, value in kwargs.items():
        if name not in types:
            raise unknown_kwarg(name, kind, types)
        if value is None:
            continue
        want = types[name]
        if want is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, want) or (want in (int, float) and isinstance(value, bool)):
            raise ConfigError(must_be(f"engine.kwargs.{name}", TYPE_WORDS[want.__name__], value, 80))
        if name in positive:
            check_value(f"engine.kwargs.{name}", value, at_least(1))
        checked[name] = value
    return checked


def one_line(error: BaseException) -> str:
    """What a library's exception says, fit for a message of ours."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def load_chat_template(given: str | None) -> str | None:
    """A template given as Jinja text or, where it has no brace and so is none, as the path of a file."""
    if not given or "{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ConfigError(f"engine.kwargs.chat_template: there is no file {given}, and it is no Jinja text")
    return path.read_text(encoding="utf-8")


def for_template(message: Message, parts: bool = False) -> dict[str, Any]:
    """A message as chat templates expect it: text content, a role they know, the arguments of calls as objects.

    `parts` leaves the content as the list that templates of models with images expect.
    """
    content = message.get("content")
    texts = [{"type": "text", "text": content}] if isinstance(content, str) and content else content or []
    plain: dict[str, Any] = {**message, "content": texts if parts else text_of(message) or ""}
    if plain["role"] == "developer":
        plain["role"] = "system"
    if isinstance(calls := message.get("tool_calls"), list) and calls:
        plain["tool_calls"] = [_with_object_arguments(call) for call in calls]
    return plain


def _with_object_arguments(call: Any) -> Any:
    try:
        return {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
    except (KeyError, TypeError, ValueError):
        return call  # not ours to judge: the template decides


_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def parse_tool_calls(text: str) -> tuple[str | None, list[ToolCall]]:
    """The text without its calls, and the calls: those between <tool_call> tags (Hermes, Qwen and many others)."""
    calls: list[ToolCall] = []
    for match in _TOOL_CALL.finditer(text):
        try:
            call = json.loads(match[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError):
            return text, []
        # Named after what it says, not at random: the same seed gives the same answer.
        digest = hashlib.sha256(f"{len(calls)}{match[1]}".encode()).hexdigest()[:16]
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({"id": f"call_{digest}", "type": "function", "function": {"name": name, "arguments": arguments}})
    return (_TOOL_CALL.sub("", text).strip() or None, calls) if calls else (text, [])


TOOL_CALL = "<tool_call>"


def safe_prefix_length(text: str, marks: Iterable[str]) -> int:
    """How many characters of a growing `text` lie before any of `marks`, whole or perhaps begun at its end."""
    end = len(text)
    for mark in marks:
        at = text.find(mark)
        if at < 0:
            begun = (n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n]))
            at = len(text) - next(begun, 0)
        end = min(end, at)
    return end


def cut_at_stop(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first stop text in it."""
    places = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


# Control characters, formats (such as those that turn the direction of writing), halves of pairs, line separators.
_ACTING = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
# What may be one of them; line ends, tabs and joiners (as in emoji) stay.
_ODD = re.compile("[^ -~\n\t\u200c\u200d]")


def visible(text: str, instead: str | None = None) -> str:
    """`text` with all that would act instead of being seen, in a terminal or on a page, spelled out."""

    def shown(found: re.Match[str]) -> str:
        if unicodedata.category(found[0]) not in _ACTING:
            return found[0]
        return instead or found[0].encode("unicode_escape").decode()

    return _ODD.sub(shown, text.replace("\r\n", "\n"))
