"""Error types and codes, and the messages that name the nearest known word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

ErrorType = Literal[
    "invalid_input",
    "context_length",
    "content_filter",
    "auth",
    "not_found",
    "bad_request",
    "rate_limit",
    "server",
    "timeout",
    "connection",
    "bad_response",
    "schema_mismatch",
    "engine_crash",
    "cancelled",
    "budget",
]


class EaglerayError(Exception):
    """Base of every error this project raises on purpose; its text is one line a user can act on."""


class ConfigError(EaglerayError):
    """The configuration is wrong (exit status 2)."""


class Outage(EaglerayError):
    """A server has not answered for longer than the run wants to wait; what is done is kept (exit status 4)."""


class EngineError(EaglerayError):
    """One request failed; becomes that row's `error`, never a crash.

    `retryable` says whether the same request may succeed later; what to do about it is the caller's policy.
    """

    def __init__(self, type: ErrorType, message: str, *, status: int | None = None, retryable: bool = False) -> None:
        super().__init__(message)
        self.type: ErrorType = type
        self.status = status
        self.retryable = retryable
        self.retry_after: float | None = None  # seconds a provider asks to wait
        self.attempts = 1
        self.paid = False  # an answer came, or was under way, that may have to be paid all the same

    def __reduce__(self) -> Any:
        return _rebuild_engine_error, (self.type, str(self), self.status, self.retryable)


def _rebuild_engine_error(type: ErrorType, message: str, status: int | None, retryable: bool) -> EngineError:
    return EngineError(type, message, status=status, retryable=retryable)


def invalid(message: str) -> EngineError:
    return EngineError("invalid_input", message)


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"`, or a list of the known names where none is close and they are few."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(known)})" if len(known) <= 24 else ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of a configuration that was found before a run. `local` means that another machine may not have it."""

    text: str
    code: str = "configuration"
    key: str | None = None
    local: bool = False


@dataclass(slots=True)
class Failure:
    type: ErrorType
    message: str
    status: int | None = None
    retryable: bool = False

    @classmethod
    def of(cls, error: EngineError) -> Failure:
        return cls(error.type, str(error), error.status, error.retryable)
