"""Errors: their types, their codes, and how messages name the nearest right word."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from engines.url_secrets import without_url_secrets
from engines.usage import Usage

# The types of a failed row's `error`. Each type is also an error code.
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


# The requests that would fail with the same error. `row`: only this one. `model`: all for its model. `key`: all with its
# key or account. `run`: all of this configuration, because the server refuses its address or parameters.
Scope = Literal["row", "model", "key", "run"]


# The types of errors with which a server refuses a request before its model reads it.
REFUSALS = ("auth", "not_found", "bad_request")


class ErrorCode(StrEnum):
    """The codes of errors, for programs: code compares these, never the text of a message.

    The second value is the anchor of the section in docs/errors.md that explains the error.
    """

    anchor: str

    def __new__(cls, code: str, anchor: str) -> ErrorCode:
        member = str.__new__(cls, code)
        member._value_, member.anchor = code, anchor
        return member

    # Wrong configuration
    CONFIGURATION = "configuration", "2-wrong-configuration"
    UNKNOWN_PARAMETER = "unknown-parameter", "2-wrong-configuration"
    PACKAGE_MISSING = "package-missing", "2-wrong-configuration"
    KEY_MISSING = "key-missing", "2-wrong-configuration"
    ENV_FILE = "env-file", "a-file-with-api-keys"
    RUN_FILE = "run-file", "a-run-file-that-cannot-be-read"
    SECRET_IN_FILE = "secret-in-file", "a-secret-in-a-run-file"
    FILE_EXISTS = "file-exists", "a-run-file-that-exists"
    MODEL_NOT_FOUND = "model-not-found", "2-wrong-configuration"
    INPUT_FILES = "input-files", "input-files-that-cannot-be-read"
    TABLE = "table", "delta-and-lance-tables"
    NO_ROW = "no-row", "no-row-that-can-be-asked"
    OUTPUT_NOT_OURS = "output-not-ours", "a-directory-that-is-not-an-output"
    NO_SAVED_CONFIGURATION = "no-saved-configuration", "an-output-without-its-configuration"
    OTHER_DATASET = "other-dataset", "an-output-of-another-dataset"
    INPUT_IN_OUTPUT = "input-in-output", "input-inside-the-output"
    FILE_IN_THE_WAY = "file-in-the-way", "a-file-in-the-way"
    NO_BATCH_API = "no-batch-api", "batches"
    BATCHES_UNDER_WAY = "batches-under-way", "batches"
    OUTPUT_BUSY = "output-busy", "another-run-writes-there"
    NO_RAY_CLUSTER = "no-ray-cluster", "no-ray-cluster"
    NO_ROOM = "no-room", "no-room-for-a-replica"
    PACKAGE_CLASH = "package-clash", "packages-of-the-same-name"
    # A run that stopped early
    STOPPED = "stopped", "4-stopped-early"
    INTERRUPTED = "interrupted", "4-stopped-early"
    KEY_REFUSED = "key-refused", "auth"
    ACCOUNT_EMPTY = "account-empty", "an-account-without-money"
    REQUESTS_REFUSED = "requests-refused", "requests-that-are-all-refused"
    BUDGET_SPENT = "budget-spent", "budget"
    TOO_MANY_ERRORS = "too-many-errors", "too-many-failed-rows"
    ENGINES_DIED = "engines-died", "engines-that-die"
    OUT_OF_MEMORY = "out-of-memory", "memory-that-runs-out"
    RAY_ENDED = "ray-ended", "ray-that-ends"
    SERVER_OUTAGE = "server-outage", "a-server-that-does-not-answer"
    ROWS_MISSING = "rows-missing", "rows-without-an-answer"
    INPUT_UNREADABLE = "input-unreadable", "input-that-cannot-be-read"
    OUTPUT_TAKEN = "output-taken", "a-run-that-lost-its-output"
    STORE_FAILED = "store-failed", "a-disk-or-store-that-fails"


def docs_link(code: str) -> str:
    """The section of docs/errors.md that explains an error code; the section of an `ErrorType` has the type's name."""
    return f"docs/errors.md#{code.anchor if isinstance(code, ErrorCode) else code}"


class EaglerayError(Exception):
    """Base of every error this project raises on purpose. Its text is one line that a user can act on.

    `code` says what happened. `key` names the configuration key that is wrong (or `engine=…`). Both survive pickling.
    """

    default_code = ErrorCode.STOPPED

    def __init__(self, message: object = "", *, code: str | None = None, key: str | None = None) -> None:
        super().__init__(without_url_secrets(message) if isinstance(message, str) else message)
        self.given_code = code
        self.key = key

    @property
    def code(self) -> str:
        return self.given_code or self.default_code


class ConfigError(EaglerayError):
    """The configuration is wrong (exit status 2)."""

    default_code = ErrorCode.CONFIGURATION


class Outage(EaglerayError):
    """A server has not answered for longer than the run may wait. Finished rows are kept (exit status 4)."""

    default_code = ErrorCode.SERVER_OUTAGE


class EngineError(EaglerayError):
    """One request failed. It becomes that row's `error` and never ends the run.

    `retryable` says whether the same request may succeed later; the caller decides what to do about it.
    """

    def __init__(
        self,
        type: ErrorType,
        message: str,
        *,
        status: int | None = None,
        retryable: bool = False,
        code: str | None = None,
        key: str | None = None,
        scope: Scope = "row",
    ) -> None:
        super().__init__(message, code=code, key=key)
        self.type: ErrorType = type
        self.status = status
        self.retryable = retryable
        self.scope: Scope = scope
        self.retry_after: float | None = None  # seconds the provider asks us to wait
        self.attempts = 1
        self.usage: Usage | None = None  # of an answer that may have to be paid; None: nothing was answered

    @property
    def code(self) -> str:
        return self.given_code or self.type

    def __reduce__(self) -> Any:
        plain = {"status": self.status, "retryable": self.retryable, "code": self.given_code, "key": self.key}
        return _rebuild_engine_error, (self.type, str(self), {**plain, "scope": self.scope})


def _rebuild_engine_error(type: ErrorType, message: str, plain: dict[str, Any]) -> EngineError:
    return EngineError(type, message, **plain)


class OutOfMemory(EngineError):
    """The memory of a device ran out. `alone`: on this request alone; otherwise it fits with fewer requests at once.

    The type `engine_crash` says that the engine must be loaded again.
    """

    def __init__(self, message: str, *, alone: bool, type: ErrorType = "server") -> None:
        super().__init__(type, message, retryable=not alone, code=ErrorCode.OUT_OF_MEMORY)


# PyTorch's error class, and what CUDA and others write. The exception itself was in a process that is gone.
_NO_MEMORY = re.compile("OutOfMemoryError|out of memory", re.IGNORECASE)


def engine_died(message: str) -> EngineError:
    """The error of a process of an engine that died. `message` has the last error in its log."""
    if _NO_MEMORY.search(message):
        return OutOfMemory(message, alone=False, type="engine_crash")
    return EngineError("engine_crash", message)


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of a configuration that was found before a run. `local` means that another machine may not have it,
    `is_warning` that a run is possible all the same.
    """

    text: str
    code: str = ErrorCode.CONFIGURATION
    key: str | None = None
    local: bool = False
    is_warning: bool = False

    @classmethod
    def of(cls, error: EaglerayError, *, local: bool = False) -> Finding:
        return cls(str(error), error.code, error.key, local)

    def error(self) -> ConfigError:
        return ConfigError(self.text, code=self.code, key=self.key)


@dataclass(slots=True)
class Failure:
    """The error of a row as plain values. The ledger keeps the first four."""

    type: ErrorType
    message: str
    status: int | None = None
    retryable: bool = False
    scope: Scope = "row"
    code: str | None = None

    @classmethod
    def of(cls, error: EngineError) -> Failure:
        return cls(error.type, str(error), error.status, error.retryable, error.scope, error.given_code)

    @property
    def needs_room(self) -> bool:
        """True if the request fits into memory when fewer are in the engine."""
        return self.code == ErrorCode.OUT_OF_MEMORY and self.retryable


def forget_frames(error: BaseException | None) -> None:
    """Frees the function calls that an error, or one behind it, came through. Call it when the error is dealt with.

    Such calls hold the body of a request, and many hold the error itself. In such a cycle, the body would stay in memory
    until Python's collector runs, which it does rarely in a worker (see pipeline/garbage.py).
    """
    if error is not None:
        behind = error.__cause__, error.__context__
        error.__traceback__ = error.__cause__ = error.__context__ = None
        for each in behind:
            forget_frames(each)


# -- messages -------------------------------------------------------------------------------------------------------


def invalid(message: str, *, code: str | None = None, key: str | None = None) -> EngineError:
    """An `invalid_input` error."""
    return EngineError("invalid_input", message, code=code, key=key)


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most similar; None if none is similar enough."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"`, or a list of the known names if none is close and there are few."""
    known = sorted(known)
    if close := closest(name, known):
        return f" (did you mean '{close}'?)"
    return f" (known: {', '.join(known)})" if len(known) <= 24 else ""


def must_be(name: str, wanted: str, value: object, limit: int | None = None) -> str:
    """The message for a value that is not allowed: `"top_p must be a number between 0.0 and 1.0, not 'x'"`."""
    shown = repr(value)
    return f"{name} must be {wanted}, not {shown if limit is None else shown[:limit]}"


def no_such(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that does not exist: `"there is no engine 'ecko' (did you mean 'echo'?)"`."""
    return f"there is no {kind} '{name}'{nearest(str(name), known)}"


def unknown_kwarg(name: str, engine: str, known: Iterable[str], hint: str = "") -> ConfigError:
    """The error for a keyword in `engine.kwargs` that the engine does not have."""
    text = f"engine.kwargs.{name} is not known to engine={engine}{nearest(name, known)}"
    return ConfigError(f"{text}; {hint}" if hint else text, key=f"engine={engine}")


def unknown_key(name: object, known: Iterable[str], where: str) -> ConfigError:
    """The error for a configuration key that does not exist; `where` is the dotted path above it."""
    key = f"{where}.{name}" if where else str(name)
    return ConfigError(f"there is no key '{key}'{nearest(str(name), known)}", key=where or None)
