"""State that belongs to one event loop. An engine may be used from several threads, each with a loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerLoop(Generic[T]):
    """One value for each event loop, made when a loop first asks. Values of closed loops are dropped.

    Not a weak-keyed mapping: a value such as `asyncio.Event` holds its loop, and so would keep its own key alive.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self.make = make
        self.values: dict[asyncio.AbstractEventLoop, T] = {}
        self.lock = threading.Lock()

    def get(self) -> T:
        """The value of the running loop."""
        loop = asyncio.get_running_loop()
        value = self.values.get(loop)
        if value is None:
            value = self.make()
            with self.lock:
                self.values = {other: kept for other, kept in self.values.items() if not other.is_closed()}
                self.values[loop] = value
        return value

    def call(self, function: Callable[[T], object]) -> None:
        """Calls `function` with each loop's value, in that loop's thread."""
        for loop, value in self.values.items():
            call_in(loop, function, value)


def call_in(loop: asyncio.AbstractEventLoop, function: Callable[[T], object], value: T) -> bool:
    """Calls `function(value)` in the thread of `loop`: now if that loop runs here, else soon. False if it is closed."""
    if asyncio._get_running_loop() is loop:
        function(value)
        return True
    with contextlib.suppress(RuntimeError):  # the loop has closed
        loop.call_soon_threadsafe(function, value)
        return True
    return False
