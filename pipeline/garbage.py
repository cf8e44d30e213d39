"""Makes Python's collector of reference cycles run rarely, in the processes that handle many rows."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

# New objects before the youngest generation is collected, and collections of it before the next generation's. Rows are many
# objects without cycles. With Python's defaults, the collector takes a third of the time of reading rows, because it visits
# all of them again and again.
THRESHOLDS = (20_000, 20, 20)


def collect_rarely() -> None:
    """Applies `THRESHOLDS` to this process, and excludes what it has loaded so far. Later calls do nothing."""
    if gc.get_threshold() != THRESHOLDS:
        gc.freeze()
        gc.set_threshold(*THRESHOLDS)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """For work that holds many rows for a short time: the collector would visit each of them several times."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
