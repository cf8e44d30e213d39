"""Text functions: keywords, messages for templates, tool calls and stop texts in answers; one-line texts for messages."""

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
    """The keywords that are not None. The type `object` in `types` allows any value; those in `positive` are at least 1.

    Raises `ConfigError` for a wrong type or value, and for an unknown keyword (with the nearest known one).
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
    """The text of a library's exception in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def load_chat_template(given: str | None) -> str | None:
    """The Jinja text of a template that is given as text or as the path of a file. A text without a brace is a path.

    Raises `ConfigError` if there is no such file.
    """
    if not given or "{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ConfigError(f"engine.kwargs.chat_template: there is no file {given}, and the value is not Jinja text")
    return path.read_text(encoding="utf-8")


def for_template(message: Message, parts: bool = False) -> dict[str, Any]:
    """A message as chat templates expect it: content as text, a known role, arguments of tool calls as objects.

    With `parts`, the content is a list of parts, as templates of models with image input expect.
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
        return call  # the template decides


_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def parse_tool_calls(text: str) -> tuple[str | None, list[ToolCall]]:
    """The text without its tool calls, and the calls: JSON between <tool_call> tags, the format of Hermes and Qwen.

    If one of them is not valid, the text is returned unchanged, without calls.
    """
    calls: list[ToolCall] = []
    for match in _TOOL_CALL.finditer(text):
        try:
            call = json.loads(match[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError):
            return text, []
        # The id is a hash of the call, not random: the same seed gives the same answer.
        digest = hashlib.sha256(f"{len(calls)}{match[1]}".encode()).hexdigest()[:16]
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({"id": f"call_{digest}", "type": "function", "function": {"name": name, "arguments": arguments}})
    return (_TOOL_CALL.sub("", text).strip() or None, calls) if calls else (text, [])


TOOL_CALL = "<tool_call>"


def safe_prefix_length(text: str, marks: Iterable[str]) -> int:
    """The length of the part of a growing `text` before the first of `marks`.

    A mark may have begun at the end of the text: then the part ends before it.
    """
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


# Unicode categories of control characters, format characters (such as a change of the writing direction), surrogates and
# line separators.
_ACTING = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
# Candidates for these categories. Line feeds, tabs and joiners (as in emoji) are kept.
_ODD = re.compile("[^ -~\n\t\u200c\u200d]")


def visible(text: str, instead: str | None = None) -> str:
    """`text` with control characters, which a terminal or a page would obey, replaced by escapes or by `instead`."""

    def shown(found: re.Match[str]) -> str:
        if unicodedata.category(found[0]) not in _ACTING:
            return found[0]
        return instead or found[0].encode("unicode_escape").decode()

    return _ODD.sub(shown, text.replace("\r\n", "\n"))
