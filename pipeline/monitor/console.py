"""Messages to the console."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from pipeline.monitor.notebook import NotebookConsole

# Seconds between the progress lines in a notebook, where one replaces the other.
NOTEBOOK_S = 1.0


def warn(console: Console, text: str) -> None:
    """Prints a warning. As `Text`, because `text` may quote a row, which must not be interpreted as markup."""
    console.print(Text(text, "yellow"))


def progress_line(console: Console, text: str) -> None:
    """Prints a line about the progress. In a notebook it replaces the one before."""
    if isinstance(console, NotebookConsole):
        console.show_line(text)
    else:
        console.print(Text(text), soft_wrap=True)


def progress_interval(console: Console, every_s: float) -> float:
    """The seconds between two progress lines."""
    return min(every_s, NOTEBOOK_S) if isinstance(console, NotebookConsole) else every_s
