"""What a person sees while a run goes on: one live bar on a terminal, a line every so often elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline.feed import Status


class RunProgress:
    """Shows `Status` after `Status`."""

    def __init__(self, console: Console, every_s: float) -> None:
        self.console, self.every_s = console, every_s
        self.bar: Progress | None = None
        self.started = self.shown = time.monotonic()
        if console.is_terminal:
            self.bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task("rows", total=None, detail="")

    def __enter__(self) -> RunProgress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, status: Status) -> None:
        elapsed = time.monotonic() - self.started
        settled = status.answered + status.invalid + status.duplicates + status.done + status.failed
        rate = (status.done + status.failed) / elapsed if elapsed > 0 else 0.0
        tokens = status.output_tokens / elapsed if elapsed > 0 else 0.0
        detail = f"{rate:,.1f} rows/s · {tokens:,.0f} tok/s · {status.failed + status.invalid} failed"
        if status.trouble:
            detail += f" · trying again: {escape(status.trouble)}"
        if self.bar is not None:
            # While files are still being read the total only grows.
            self.bar.update(self.task, completed=settled, total=status.read or None, detail=detail)
        elif time.monotonic() - self.shown >= self.every_s:
            self.shown = time.monotonic()
            more = "" if status.fed else "+"
            self.console.print(f"{settled:,} of {status.read:,}{more} rows · {detail} · {elapsed:,.0f} s", highlight=False)
