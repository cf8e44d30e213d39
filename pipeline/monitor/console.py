"""Messages to the console."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def warn(console: Console, text: str) -> None:
    """Prints a warning; as Text, because a row's own words may be in it and must not be obeyed as markup."""
    console.print(Text(text, "yellow"))
