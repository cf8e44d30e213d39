"""Maps failed HTTP requests to our error types, and reads rate limits from response headers."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import orjson

from engines.errors import EngineError, ErrorType

# Statuses of an overloaded provider; only these shrink the number of requests in flight.
OVERLOAD = frozenset((429, 503, 529))

_TYPES: dict[int, ErrorType] = {
    400: "bad_request", 401: "auth", 402: "auth", 403: "auth", 404: "not_found", 405: "bad_request", 408: "timeout",
    409: "server", 413: "bad_request", 422: "bad_request", 425: "server", 429: "rate_limit", 501: "bad_request",
    504: "timeout",
}  # fmt: skip
_RETRIED = frozenset((408, 409, 425, 429))

_CONTEXT = re.compile(
    r"context[ _](length|window)|maximum context|too many (input )?tokens|prompt is too long|input is too long"
    r"|max_model_len|exceeds? the (model|maximum|available context)|request too large",
    re.IGNORECASE,
)
_FILTER = re.compile(r"content[ _-]?(filter|policy|management)|safety|moderation|blocked by", re.IGNORECASE)
# A 429 that waiting does not solve: the account has no money left.
_BROKE = re.compile(
    r"insufficient_quota|exceeded your current quota|insufficient (balance|credit|funds)|billing", re.IGNORECASE
)


def failure(status: int, content: bytes, headers: Mapping[str, str]) -> EngineError:
    """The error of an unsuccessful response. Its `retry_after` is the wait in seconds that the provider asks for."""
    code, message = _said(content)
    text = f"HTTP {status}: {message}" if message else f"HTTP {status}"
    kind: ErrorType = _TYPES.get(status, "server" if status >= 500 else "bad_request")
    retryable = status in _RETRIED or (status >= 500 and status != 501)
    if (said := _type_in_words(status, f"{code} {message}")) is not None:
        kind = said
        retryable = retryable and said == "content_filter"
    if 300 <= status < 400:
        place = headers.get("location", "another address")
        text, kind = (
            f"HTTP {status}: the server sends to {place[:200]}; redirects are not followed, set engine.base_url",
            "not_found",
        )
    error = EngineError(kind, text, status=status, retryable=retryable)
    error.retry_after = retry_after(headers)
    return error


def _type_in_words(status: int, text: str) -> ErrorType | None:
    """The type that the provider's words give away, where its status does not say enough.

    Most providers have no code for these, or each its own, so their words are searched.
    """
    if status in (400, 413, 422, 429) and _CONTEXT.search(text) and not (status == 429 and "per min" not in text.lower()):
        return "context_length"
    if status == 400 and _FILTER.search(text):
        return "content_filter"
    if status == 429 and _BROKE.search(text):
        return "auth"
    return None


def _said(content: bytes) -> tuple[str, str]:
    """The code and the message in an error's body; providers use several shapes."""
    try:
        found: Any = orjson.loads(content)
    except ValueError:
        return "", " ".join(re.sub(r"<[^>]*>", " ", content[:2000].decode(errors="replace")).split())[:300]
    if isinstance(found, list) and found:
        found = found[0]
    inner = found.get("error", found) if isinstance(found, dict) else found
    if not isinstance(inner, dict):
        return "", " ".join(str(inner).split())[:500]
    code = " ".join(str(inner[name]) for name in ("code", "type", "status") if isinstance(inner.get(name), str))
    message = inner.get("message") or inner.get("detail") or inner.get("msg") or code or inner
    return code, " ".join(str(message).split())[:500]


def broken(error: Exception) -> EngineError:
    """The error of a request without a response."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, httpx.ConnectTimeout):
        return EngineError("connection", f"no connection in time: {said}", retryable=True)
    if isinstance(error, (httpx.TimeoutException, TimeoutError)):
        return EngineError("timeout", f"no answer in time: {said}", retryable=True)
    if isinstance(error, httpx.DecodingError):
        return EngineError("bad_response", f"the answer's encoding is broken: {said}", retryable=True)
    if isinstance(error, (httpx.UnsupportedProtocol, httpx.InvalidURL)):
        return EngineError("bad_request", said)
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
        if number := _number(found):
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
