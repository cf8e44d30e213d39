"""Collects Ctrl-C and SIGTERM, so that a run can finish its requests in flight before it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from pipeline.monitor.progress import restore_terminal

# The exit status of a run that Ctrl-C or SIGTERM ended.
INTERRUPTED = 130


class Interrupts(list[int]):
    """The numbers of the signals received so far."""

    def __init__(self, *, in_program: bool = False) -> None:
        """`in_program`: the process is a user's program or notebook, which a second signal must not end."""
        super().__init__()
        self.in_program = in_program


@contextlib.contextmanager
def note_signals(found: Interrupts | None = None) -> Iterator[Interrupts]:
    """Appends the number of each Ctrl-C and SIGTERM to `found`. The second one ends the process at once, or raises
    `KeyboardInterrupt` in a program. Python gives signals to the main thread only: other threads note none."""
    found = Interrupts() if found is None else found

    def note(number: int, _: object) -> None:
        found.append(number)
        if len(found) > 1:
            if found.in_program:
                raise KeyboardInterrupt
            restore_terminal()
            os._exit(INTERRUPTED)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
