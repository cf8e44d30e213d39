"""Messages to the console."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def warn(console: Console, text: str) -> None:
    """Prints a warning. As `Text`, because `text` may quote a row, which must not be interpreted as markup."""
    console.print(Text(text, "yellow"))
