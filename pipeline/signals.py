"""Ctrl-C and SIGTERM: collected instead of obeyed, so that a run can finish what is in flight."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from pipeline.monitor.progress import restore_terminal

# The exit status of a run that Ctrl-C or SIGTERM ended.
INTERRUPTED = 130


@contextlib.contextmanager
def note_signals(seen: list[int] | None = None) -> Iterator[list[int]]:
    """Appends the number of each Ctrl-C and SIGTERM to `seen`. The second one ends the process at once."""
    found: list[int] = [] if seen is None else seen

    def note(number: int, _: object) -> None:
        found.append(number)
        if len(found) > 1:
            restore_terminal()
            os._exit(INTERRUPTED)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
