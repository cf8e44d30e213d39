"""Errors that end a run early."""

from __future__ import annotations

from collections.abc import Mapping

from engines.errors import EaglerayError, ErrorCode


class Stopped(EaglerayError):
    """The run stopped early; all that is done is committed. The same command, with `changes`, resumes (exit status 4)."""

    def __init__(self, message: object, changes: Mapping[str, str] | None = None, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.changes = dict(changes or {})


class EnginesDied(Stopped):
    """The engines died again and again without finishing a row; their last output is in Ray's logs."""

    default_code = ErrorCode.ENGINES_DIED


class Interrupted(EaglerayError):
    """Ctrl-C or SIGTERM (exit status 130). The same command, with `changes`, resumes."""

    default_code = ErrorCode.INTERRUPTED

    def __init__(self, message: object) -> None:
        super().__init__(message)
        self.changes: dict[str, str] = {}  # as those of `Stopped`
