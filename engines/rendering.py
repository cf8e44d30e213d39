"""Requests as text for people, in dry runs. Long texts are cut."""

from __future__ import annotations

import json
from typing import Any

from engines.types import Request

# Characters of one text in a request; the rest is cut.
SHOWN_TEXT = 2000


def render_messages(request: Request, prompt: str | None = None) -> str:
    """The messages or inputs, or the `prompt` that a model's template makes of them, and the parameters that are set."""
    row = {name: value for name in ("model", "adapter") if (value := getattr(request, name)) is not None}
    row |= request.extra_body
    params = [f"{name}: {pretty(value)}" for name, value in {**row, **request.generation.given()}.items()]
    return "\n".join([pretty(request.messages or request.inputs) if prompt is None else _cut(prompt), *params])


def render_http(url: str, headers: dict[str, str], body: dict[str, Any]) -> str:
    """An HTTP request; `headers` hold no secrets."""
    return "\n".join([f"POST {url}", *(f"{name}: {value}" for name, value in headers.items()), "", pretty(body)])


def pretty(value: Any) -> str:
    """A value as JSON, indented if it is a list or a mapping."""
    indent = 2 if isinstance(value, (dict, list)) else None
    return json.dumps(_shortened(value), ensure_ascii=False, indent=indent, default=str)


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    return _cut(value) if isinstance(value, str) else value


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}… ({len(text):,} characters)"
