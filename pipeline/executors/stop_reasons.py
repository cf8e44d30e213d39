"""The reasons to stop a run early that all executors share."""

from __future__ import annotations

import functools

from engines.errors import ErrorCode
from pipeline.config import RunConfig
from pipeline.errors import Stopped
from pipeline.monitor.status import RunStatus

# The provider may refuse a key that worked, because money ran out. This number of refusals in succession ends the run.
REFUSALS_TO_STOP = 20
# `max_error_rate` holds from this number of rows on.
RATE_NEEDS_ROWS = 100


def stop_reason(run: RunConfig, status: RunStatus, refused: int = 0) -> Stopped | None:
    """The reason to stop early, or None.

    `refused`: the number of rows that failed in succession because the API key was refused.
    """
    too_many = functools.partial(Stopped, code=ErrorCode.TOO_MANY_ERRORS)
    failed, finished = status.failed + status.invalid, status.done + status.failed
    example = next(iter(status.first_errors.values()), "")
    if refused >= (REFUSALS_TO_STOP if status.done else 1):
        return Stopped(f"the provider refuses the key ({status.first_errors['auth']})", code=ErrorCode.KEY_REFUSED)
    if run.max_errors is not None and failed >= run.max_errors:
        return too_many(f"{failed} rows failed, run.max_errors is {run.max_errors} (one of them: {example})")
    rate = run.max_error_rate
    if rate is not None and finished >= RATE_NEEDS_ROWS and status.failed > rate * finished:
        return too_many(f"{status.failed} of {finished} rows failed, run.max_error_rate is {rate} (one of them: {example})")
    if rate is not None and status.read >= RATE_NEEDS_ROWS and status.invalid > rate * status.read:
        return too_many(f"{status.invalid} of {status.read} rows cannot be read, run.max_error_rate is {rate}")
    return None
