"""Starts something in a thread while the caller goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Generic, TypeVar

Started = TypeVar("Started")


class BackgroundStart(AbstractContextManager[Started], Generic[Started]):
    """Enters a context manager in a thread. Entering this one waits for it, and raises its error.

    The thread lives until the end: the kernel ends Ray's processes with the thread that started them.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Started]]) -> None:
        self.make = make
        self.error: BaseException | None = None
        self.entered = False
        self.ready, self.over = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="start", daemon=True).start()

    def _run(self) -> None:
        try:
            self.context = self.make()
            self.started = self.context.__enter__()
        except BaseException as error:
            self.error = error
        self.ready.set()
        self.over.wait()

    def __enter__(self) -> Started:
        self.ready.wait()
        self.entered = True
        if self.error is not None:
            self.over.set()
            raise self.error
        return self.started

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return self.context.__exit__(kind, error, traceback)
        finally:
            self.over.set()

    def give_up(self) -> None:
        """Ends what was started, if nobody has entered this context."""
        if not self.entered:
            self.entered = True
            self.ready.wait()
            if self.error is None:
                self.context.__exit__(None, None, None)
            self.over.set()
