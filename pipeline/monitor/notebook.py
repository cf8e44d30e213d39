"""The progress of a run in a Jupyter notebook: one cell output, whose last line is replaced."""

from __future__ import annotations

import io
from collections import deque
from typing import Any

from rich.console import Console

# Lines of messages that stay in the output, and the characters in a line.
KEPT, WIDTH = 200, 110


class NotebookConsole(Console):
    """Shows messages, and below them the line that `show_line` replaces. Needs no widgets."""

    def __init__(self) -> None:
        super().__init__(file=_Messages(self), force_terminal=False, force_jupyter=False, no_color=True, width=WIDTH)
        self.messages: deque[str] = deque(maxlen=KEPT)
        self.last = ""
        self.handle: Any = None

    def show_line(self, text: str) -> None:
        """Replaces the line. An empty text removes it."""
        self.last = text
        self.refresh()

    def refresh(self) -> None:
        import IPython.display

        show: Any = IPython.display.display

        text = "\n".join([*self.messages, *filter(None, [self.last])])
        if self.handle is None:
            if text:
                self.handle = show({"text/plain": text}, raw=True, display_id=True)
        else:
            self.handle.update({"text/plain": text}, raw=True)


class _Messages(io.StringIO):
    """What rich prints to a `NotebookConsole`."""

    def __init__(self, console: NotebookConsole) -> None:
        super().__init__()
        self.console = console

    def write(self, text: str) -> int:
        self.console.messages.extend(text.rstrip("\n").split("\n"))
        self.console.refresh()
        return len(text)
