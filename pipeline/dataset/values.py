"""Reads single values of a row: text, JSON, and the types of Arrow."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from engines.errors import invalid
from pipeline.storage.exact_json import loads


def column_names(columns: Mapping[str, Any], limit: int = 20) -> str:
    """The names of a row's columns for an error message."""
    names = [str(name) for name in columns]
    return (", ".join(names[:limit]) + (", …" if len(names) > limit else "")) or "none"


def kind_word(value: Any) -> str:
    """The type of a value for an error message."""
    return {"dict": "an object", "list": "a list", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)


def text_value(value: Any, what: str) -> str:
    """The text. Raises `EngineError("invalid_input")` for another type, and for bytes that are not UTF-8."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise invalid(f"{what} is not UTF-8 text") from None
    if not isinstance(value, str):
        raise invalid(f"{what} must be text, not {kind_word(value)}")
    return value


def json_value(value: Any, what: str, kind: type = object) -> Any:
    """The value, parsed if it is JSON text. Raises `EngineError("invalid_input")` if the result is not of `kind`."""
    if isinstance(value, (str, bytes)):
        try:
            value = loads(value.encode() if isinstance(value, str) else value)
        except ValueError as error:
            raise invalid(f"{what} is text that is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise invalid(f"{what} must be {'a list' if kind is list else 'an object'}, not {kind_word(value)}")
    return value


def starts_like(value: Any, opening: str) -> bool:
    """True for text that may be JSON with this opening bracket."""
    if isinstance(value, bytes):
        return value.lstrip()[:1] == opening.encode()
    return isinstance(value, str) and value.lstrip()[:1] == opening


def from_text(cell: str) -> Any:
    """A generation parameter in a cell of a CSV file: a number, list or other JSON value, or else the text itself."""
    try:
        return loads(cell.encode())
    except ValueError:
        return cell


def from_arrow(value: Any) -> Any:
    """Converts a value from Arrow to JSON types and drops the nulls that Arrow adds to structs.

    The null `content` of an assistant message stays: it means that the message consists of tool calls only.
    """
    if isinstance(value, dict):
        assistant = value.get("role") == "assistant"
        return {k: from_arrow(v) for k, v in value.items() if v is not None or (assistant and k == "content")}
    if isinstance(value, (list, tuple)):
        return [from_arrow(v) for v in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)
