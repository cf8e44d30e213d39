"""The reasons to stop a run early that all executors share."""

from __future__ import annotations

import functools

from engines.errors import EngineError, ErrorCode
from engines.text import counted
from pipeline.config import RunConfig
from pipeline.errors import Stopped
from pipeline.monitor.status import RunStatus

KEY_REFUSED = "the provider refuses the key"
ACCOUNT_EMPTY = "the provider says that the account has no money, or that its spending limit is reached"
# `max_error_rate` holds from this number of rows on.
RATE_NEEDS_ROWS = 100


def stop_reason(run: RunConfig, status: RunStatus) -> Stopped | None:
    """The reason to stop early, or None."""
    too_many = functools.partial(Stopped, code=ErrorCode.TOO_MANY_ERRORS)
    failed, finished = status.rows_failed + status.invalid, status.rows_done + status.rows_failed
    example = next(iter(status.first_errors.values()), "")
    if run.max_errors is not None and failed >= run.max_errors:
        return too_many(f"{counted(failed, 'row')} failed, run.max_errors is {run.max_errors} (one of them: {example})")
    rate = run.max_error_rate
    if rate is not None and finished >= RATE_NEEDS_ROWS and status.rows_failed > rate * finished:
        text = f"{status.rows_failed} of {finished} rows failed, run.max_error_rate is {rate} (one of them: {example})"
        return too_many(text)
    if rate is not None and status.read >= RATE_NEEDS_ROWS and status.invalid > rate * status.read:
        return too_many(f"{status.invalid} of {status.read} rows cannot be read, run.max_error_rate is {rate}")
    return None


def account_stop(error: EngineError) -> Stopped:
    """The reason to stop for an error of the account or the key, which would hit all rows."""
    empty = error.code == ErrorCode.ACCOUNT_EMPTY
    said = ACCOUNT_EMPTY if empty else KEY_REFUSED
    code = ErrorCode.ACCOUNT_EMPTY if empty else ErrorCode.KEY_REFUSED
    return Stopped(f"{said} ({error}); no row is recorded as failed, the same command continues", code=code)
