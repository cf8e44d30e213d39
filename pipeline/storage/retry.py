"""Repeats calls that failed because an object store was briefly unavailable."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

# What pyarrow's clients say where a store failed in passing, as against what is wrong with a file or a permission.
_PASSING = re.compile(
    r"AWS Error (SLOW_DOWN|INTERNAL_FAILURE|NETWORK_CONNECTION|SERVICE_UNAVAILABLE|THROTTLING|REQUEST_TIMEOUT"
    r"|UNKNOWN \(HTTP status (429|5\d\d)\))"
    r"|google::cloud::Status\((UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED)"
    r"|Azure Error (Service(Request|Response)(Timeout)?Error|IncompleteReadError|HTTP (408|429|5\d\d))"
)

# Beyond the tries of the store's own client, which are over in seconds.
PATIENCE_S, TRIES = 120.0, 8

T = TypeVar("T")


def store_failed(error: BaseException) -> bool:
    """Whether an object store failed in passing (throttled, away), so that the same call may do better later."""
    return isinstance(error, OSError) and bool(_PASSING.search(str(error)))


def patiently(work: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """`work()`, again and again while `store_failed`. Raises what it raised last."""
    tries = Retrying(
        stop=stop_after_delay(patience_s),
        wait=wait_random_exponential(0.5, max=15),
        retry=retry_if_exception(store_failed),
        reraise=True,
    )
    return tries(work)


def steadily(start: Callable[[], Iterator[T]]) -> Iterator[T]:
    """What `start()` yields, which is the same each time; where the store fails on the way, from there on."""
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
