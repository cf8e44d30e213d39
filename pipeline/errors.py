"""Errors that end a run early."""

from __future__ import annotations

from collections.abc import Mapping

from engines.errors import EaglerayError


class Stopped(EaglerayError):
    """The run stopped early; all that is done is committed. The same command, with `changes`, resumes (exit status 4)."""

    def __init__(self, message: str, changes: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.changes = dict(changes or {})


class EnginesDied(Stopped):
    """All that engines do is die; their last words are in Ray's logs."""


class Interrupted(EaglerayError):
    """Ctrl-C or SIGTERM (exit status 130); the same command resumes."""
