"""Maps failed HTTP requests to our error types, and reads rate limits from response headers."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import orjson

from engines.errors import EngineError
from engines.remote.error_codes import meaning_of
from engines.remote.http_connection import TooLong

# Statuses of an overloaded provider; only these shrink the number of requests in flight. 498: Groq.
OVERLOAD = frozenset((429, 498, 503, 529))


def failure(status: int, content: bytes, headers: Mapping[str, str]) -> EngineError:
    """The error of an unsuccessful response. Its `retry_after` is the wait in seconds that the provider asks for."""
    body = read_body(content)
    text = f"HTTP {status}: {body.message}" if body.message else f"HTTP {status}"
    wait = retry_after(headers)
    if wait is None:
        wait = body.retry_after
    if 300 <= status < 400:
        place = headers.get("location", "another address")
        text = f"HTTP {status}: the server sends to {place[:200]}; redirects are not followed, set engine.base_url"
    meaning = meaning_of(status, body.codes, body.message, body.param, wait is not None)
    error = EngineError(
        meaning.type, text, status=status, retryable=meaning.retryable, code=meaning.code, scope=meaning.scope
    )
    error.retry_after = wait
    return error


def reported(payload: dict[str, Any], status: int, headers: Mapping[str, str]) -> EngineError:
    """The error in the JSON of an answer with status 200."""
    inner = payload["error"]
    code = inner.get("code") if isinstance(inner, dict) else None
    return failure(code if isinstance(code, int) and 400 <= code < 600 else status, orjson.dumps(payload), headers)


@dataclass(slots=True)
class ErrorBody:
    """The fields of an error's body, which each provider names and nests in its own way."""

    message: str = ""
    codes: list[str] = field(default_factory=list)  # lower case, the most specific first
    param: str | None = None
    retry_after: float | None = None  # seconds


def read_body(content: bytes) -> ErrorBody:
    try:
        found: Any = orjson.loads(content)
    except ValueError:
        text = re.sub(r"<(style|script|title)\b.*?</\1>|<[^>]*>", " ", content[:4000].decode(errors="replace"), flags=re.S)
        return ErrorBody(" ".join(text.split())[:300])
    if isinstance(found, list) and found:
        found = found[0]
    outer = found if isinstance(found, dict) else {}
    inner = (outer.get("error") or outer) if outer else found
    if not isinstance(inner, dict):  # {"error": "text", "code": …}, or no object at all
        return ErrorBody(_line(inner), _codes(outer), _text(outer.get("param")))
    said = inner.get("message") or inner.get("detail") or inner.get("msg")
    body = ErrorBody("", [*_codes(inner), *(_codes(outer) if outer is not inner else [])], _text(inner.get("param")))
    body.message = _line(said or " ".join(_codes(inner)) or inner)
    _read_details(inner.get("details"), body)
    _read_metadata(inner.get("metadata"), body)
    return body


def _codes(fields: Mapping[str, Any]) -> list[str]:
    """The codes in an object. Numbers below 1000 repeat the HTTP status."""
    nested = fields.get("innererror")
    found = [fields.get("code"), nested.get("code") if isinstance(nested, dict) else None]
    found += [fields.get(name) for name in ("type", "error_type", "status")]
    codes = [str(each).lower() for each in found if isinstance(each, (str, int)) and not isinstance(each, bool)]
    return [code for code in codes if not (code.isdigit() and int(code[:9]) < 1000)]


def _read_details(details: Any, body: ErrorBody) -> None:
    """Google's details: the reason, and the delay before a retry."""
    for detail in details if isinstance(details, list) else ():
        if not isinstance(detail, dict):
            continue
        if isinstance(reason := detail.get("reason"), str):
            body.codes.insert(0, reason.lower())
        if isinstance(delay := detail.get("retryDelay"), str):
            body.retry_after = _duration(delay)


def _read_metadata(metadata: Any, body: ErrorBody) -> None:
    """OpenRouter's metadata: a moderated input, the error of the model's host, and when a limit is free again."""
    if not isinstance(metadata, dict):
        return
    if metadata.get("flagged_input") or metadata.get("reasons"):
        body.codes.insert(0, "moderation")
    if isinstance(raw := metadata.get("raw"), str) and raw:
        host = read_body(raw.encode(errors="replace"))
        body.codes = host.codes + body.codes
        body.message = f"{body.message}: {host.message}"[:500]
        body.param = body.param or host.param
    headers = metadata.get("headers")
    if isinstance(headers, dict) and isinstance(reset := headers.get("X-RateLimit-Reset"), str):
        body.retry_after = _until(_number(reset))


def _until(reset: float | None) -> float | None:
    """Seconds until a time that is given in milliseconds since the epoch."""
    return None if reset is None else max(0.0, reset / 1000 - time.time())


def _line(value: Any) -> str:
    return " ".join(str(value).split())[:500]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def broken(error: Exception) -> EngineError:
    """The error of a request without a response."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, httpx.ConnectTimeout):
        return EngineError("connection", f"no connection within engine.connect_timeout_s: {said}", retryable=True)
    if isinstance(error, (httpx.TimeoutException, TimeoutError)):
        text = f"no answer within engine.timeout_s or engine.read_timeout_s: {said}"
        return EngineError("timeout", text, retryable=True)
    if isinstance(error, TooLong):
        return EngineError("bad_response", said)
    if isinstance(error, httpx.DecodingError):
        return EngineError("bad_response", f"the answer's encoding is broken: {said}", retryable=True)
    if isinstance(error, (httpx.UnsupportedProtocol, httpx.InvalidURL)):
        return EngineError("bad_request", said, scope="run")
    return EngineError("connection", said, retryable=True)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `retry-after-ms`, or from Retry-After as seconds or as a date."""
    milliseconds = headers.get("retry-after-ms")
    value = headers.get("retry-after")
    try:
        if milliseconds is not None:
            return max(0.0, float(milliseconds) / 1000)
        if value is None:
            return None
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value or "").timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


@dataclass(frozen=True, slots=True)
class Observed:
    """The limits of a key and model, from a response's headers."""

    limits: dict[str, float]  # a minute, by the names in `engines.remote.rate_limits.DIMENSIONS`
    pause_s: float = 0.0  # until the limit is free again


# Headers of OpenAI, whose names most providers use, and of Anthropic: (limit, remaining, reset, our name).
_HEADERS = tuple(
    (pattern.format("limit"), pattern.format("remaining"), pattern.format("reset"), name)
    for pattern, name in (
        ("x-ratelimit-{}-requests", "requests"),
        ("x-ratelimit-{}-tokens", "input_tokens"),
        ("anthropic-ratelimit-requests-{}", "requests"),
        ("anthropic-ratelimit-input-tokens-{}", "input_tokens"),
        ("anthropic-ratelimit-output-tokens-{}", "output_tokens"),
    )
)


def observed(headers: Mapping[str, str]) -> Observed | None:
    """The limits in a response's headers; None if there are none."""
    limits: dict[str, float] = {}
    pause = 0.0
    for limit, remaining, reset, name in _HEADERS:
        found = headers.get(limit)
        if found is None:  # most servers send no such headers
            continue
        if (number := _number(found)) and number > 0:
            limits[name] = number
        if _number(headers.get(remaining)) == 0:
            pause = max(pause, _duration(headers.get(reset)))
    return Observed(limits, min(pause, 60.0)) if limits or pause else None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _duration(text: str | None) -> float:
    """Seconds from `6m0s`, `120ms`, `2.5` or a date in RFC 3339 form."""
    if not text:
        return 0.0
    if (number := _number(text)) is not None:
        return number if number < 1e6 else max(0.0, number - time.time())
    parts = re.findall(r"([\d.]+)(ms|s|m|h|d)", text)
    if parts and "".join(a + b for a, b in parts) == text:
        return sum(float(amount) * _UNITS[unit] for amount, unit in parts)
    try:
        return max(0.0, datetime.fromisoformat(text).timestamp() - time.time())
    except ValueError:
        return 0.0
