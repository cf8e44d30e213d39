"""Text functions: messages for chat templates, tool calls and stop texts in answers, one-line texts of errors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engines.errors import ConfigError
from engines.types import Message, ToolCall, clean_message, plain_message, text_of
from engines.url_secrets import without_url_secrets


def one_line(error: BaseException) -> str:
    """The text of a library's exception in one line of at most 300 characters, which UTF-8 can encode."""
    return encodable(without_url_secrets(" ".join(str(error).split())))[:300] or type(error).__name__


def flattened(text: str) -> str:
    """A text that may come from data or from a library, as one line without control characters."""
    return visible(" ".join(text.split()))


def encodable(text: str) -> str:
    """The text with escapes in place of the characters that UTF-8 cannot encode: halves of UTF-16 pairs."""
    return text.encode("utf-8", "backslashreplace").decode()


def counted(number: float, noun: str, nouns: str | None = None) -> str:
    """A number with its noun: `1 row`, `1,234 rows`. `nouns` is the plural, if it is not `noun` with an s."""
    count = f"{int(number):,}" if number == int(number) else f"{number:,g}"
    return f"{count} {noun}" if number == 1 else f"{count} {nouns or noun + 's'}"


def load_chat_template(given: str | None) -> str | None:
    """The Jinja text of a template that is given as text or as the path of a file. A text without a brace is a path.

    Raises `ConfigError` if there is no such file.
    """
    if not given or "{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"engine.kwargs.chat_template: there is no file {given}, and the value is not Jinja text", key="engine.kwargs"
        )
    return path.read_text(encoding="utf-8")


def for_template(message: Message, parts: bool = False) -> dict[str, Any]:
    """A message as chat templates expect it: content as text, a known role, arguments of tool calls as objects.

    With `parts`, the content is a list of parts, as templates of models with image input expect. Raises
    `EngineError("invalid_input")` for audio without a transcript.
    """
    message = plain_message(message)
    content = message.get("content")
    texts = [{"type": "text", "text": content}] if isinstance(content, str) and content else content or []
    plain: dict[str, Any] = {**clean_message(message), "content": texts if parts else text_of(message) or ""}
    if plain["role"] == "developer":
        plain["role"] = "system"
    if isinstance(calls := message.get("tool_calls"), list) and calls:
        plain["tool_calls"] = [_with_object_arguments(call) for call in calls]
    return plain


def _with_object_arguments(call: Any) -> Any:
    try:
        return {**call, "function": {**call["function"], "arguments": _parsed(call["function"]["arguments"])}}
    except (KeyError, TypeError, ValueError):
        return call  # the template decides


def _parsed(text: str) -> Any:
    """The value of a JSON text. Raises `ValueError` also for a value that no file and no tokenizer takes: it is nested too
    deeply, or an escape in it is half of a UTF-16 pair."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def parse_tool_calls(text: str) -> tuple[str | None, list[ToolCall]]:
    """The text without its tool calls, and the calls: JSON between <tool_call> tags, the format of Hermes and Qwen.

    If one of them is not valid, the text is returned unchanged, without calls.
    """
    calls: list[ToolCall] = []
    for match in _TOOL_CALL.finditer(text):
        try:
            call = _parsed(match[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError):
            return text, []
        # The id is a hash of the call, not random: the same seed gives the same answer.
        digest = hashlib.sha256(f"{len(calls)}{match[1]}".encode()).hexdigest()[:16]
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({"id": f"call_{digest}", "type": "function", "function": {"name": name, "arguments": arguments}})
    return (_TOOL_CALL.sub("", text).strip() or None, calls) if calls else (text, [])


TOOL_CALL = "<tool_call>"

# Reasoning before an answer. A chat template may have put the opening tag into the prompt.
_TAG = "(?:think|thinking|thought|reasoning)"
_THOUGHT = re.compile(rf"\A\s*(?:<{_TAG}>)?(.*?)</{_TAG}>", re.DOTALL)
_THOUGHT_BEGINS = re.compile(rf"\A\s*<{_TAG}>")
_FENCE = re.compile(r"```[\w-]*\s*")
_JSON = json.JSONDecoder()


def split_thought(text: str) -> tuple[str, int]:
    """The reasoning in tags at the beginning of a text, and the place where the answer after it begins: 0 if there is no
    reasoning, the end of the text if the reasoning has no end."""
    if found := _THOUGHT.match(text):
        return found[1].strip(), found.end()
    return "", len(text) if _THOUGHT_BEGINS.match(text) else 0


def fenced_json(text: str) -> Iterator[tuple[int, int]]:
    """The places (begin, end) of the JSON values that follow a code fence, the last one first."""
    for fence in reversed(list(_FENCE.finditer(text))):
        with contextlib.suppress(ValueError, RecursionError):
            yield fence.end(), _JSON.raw_decode(text, fence.end())[1]


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
