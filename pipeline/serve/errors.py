"""Errors in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

from engines.errors import Failure

_STATUSES = {"invalid_input": 400, "context_length": 400, "content_filter": 400, "bad_request": 400, "auth": 401,
             "not_found": 404, "rate_limit": 429, "engine_crash": 503, "cancelled": 503, "timeout": 504,
             "connection": 502, "bad_response": 502}  # fmt: skip
_CODES = {"context_length": "context_length_exceeded", "not_found": "model_not_found", "auth": "invalid_api_key"}


def status_of(failure: Failure) -> int:
    """The HTTP status of a failed request: that of the provider behind the engine, or one that fits the error's type."""
    if failure.status is not None and failure.status >= 400:
        return failure.status
    return _STATUSES.get(failure.type, 500)


def error_body(failure: Failure) -> dict[str, Any]:
    """The body of an error response in OpenAI's form."""
    status = status_of(failure)
    kind = {401: "authentication_error", 403: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    code = _CODES.get(failure.type, failure.type)
    return {"error": {"message": failure.message, "type": kind, "param": None, "code": code}}
