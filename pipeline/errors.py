"""Errors that end a run early."""

from __future__ import annotations

from engines.errors import EaglerayError


class Stopped(EaglerayError):
    """The run stopped early; all that is done is committed, and the same command resumes (exit status 4)."""


class EnginesDied(Stopped):
    """All that engines do is die; their last words are in Ray's logs."""


class Interrupted(EaglerayError):
    """Ctrl-C or SIGTERM (exit status 130); the same command resumes."""
