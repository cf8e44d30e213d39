"""Repeats calls that failed because an object store was briefly unavailable."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

# Errors of pyarrow's clients, and of our Azure client, that mean a temporary failure of the store, not a wrong file or a
# missing permission. The clients give no structured code, so the text is searched.
_PASSING = re.compile(
    r"AWS Error (SLOW_DOWN|INTERNAL_FAILURE|NETWORK_CONNECTION|SERVICE_UNAVAILABLE|THROTTLING|REQUEST_TIMEOUT"
    r"|UNKNOWN \(HTTP status (429|5\d\d)\))"
    r"|google::cloud::Status\((UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED)"
    r"|Azure Error (Service(Request|Response)(Timeout)?Error|IncompleteReadError|HTTP (408|429|5\d\d))"
)

# Retries beyond those of the store's own client, which end within seconds.
PATIENCE_S, TRIES = 120.0, 8

T = TypeVar("T")


class StoreError(OSError):
    """A read from a store of fsspec failed. Its clients raise types of their own, so every failure counts as temporary."""


def store_failed(error: BaseException) -> bool:
    """True if an object store failed temporarily (throttled, unavailable): the same call may succeed later."""
    return isinstance(error, StoreError) or (isinstance(error, OSError) and bool(_PASSING.search(str(error))))


def patiently(work: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """Calls `work` and repeats it while `store_failed`, for up to `patience_s` seconds. Raises the last error."""
    tries = Retrying(
        stop=stop_after_delay(patience_s),
        wait=wait_random_exponential(0.5, max=15),
        retry=retry_if_exception(store_failed),
        reraise=True,
    )
    return tries(work)


def steadily(start: Callable[[], Iterator[T]]) -> Iterator[T]:
    """Yields the items of `start()`, which must be the same in each call. If the store fails, calls `start` again and
    continues after the last item. Raises after `TRIES` failures without a new item."""
    passed = failures = 0
    while True:
        try:
            for item in itertools.islice(start(), passed, None):
                passed, failures = passed + 1, 0
                yield item
            return
        except OSError as error:
            failures += 1
            if failures > TRIES or not store_failed(error):
                raise
            time.sleep(random.uniform(0, min(15, 2**failures)))
