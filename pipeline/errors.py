"""Errors that end a run early."""

from __future__ import annotations

from engines.errors import EaglerayError, ErrorCode


class Stopped(EaglerayError):
    """The run stopped early. Everything that is done is committed, and the same command resumes (exit status 4)."""


class EnginesDied(Stopped):
    """The engines died again and again without finishing a row; their last output is in Ray's logs."""

    default_code = ErrorCode.ENGINES_DIED


class Interrupted(EaglerayError):
    """Ctrl-C or SIGTERM (exit status 130). The same command resumes."""

    default_code = ErrorCode.INTERRUPTED
