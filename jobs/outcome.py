"""Prints the result of a run: the counts, the first answers and the paths of the results."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.text import counted
from jobs.guide import see_type
from pipeline.monitor.console import warn
from pipeline.output.summary import first_rows, lines
from pipeline.storage.filesystem import child
from pipeline.storage.output_files import DATA, ERRORS, MANIFEST, REPORT


def show_outcome(manifest: dict[str, Any], path: str, console: Console) -> None:
    """Prints a table of the first rows, and the figures of the run."""
    rows = manifest["rows"]
    warn_if_empty(manifest, console)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    shown = first_rows(manifest, path)
    for at, (title, most) in enumerate((("id", 18), ("last message", 30))):  # the answer takes the remaining width
        longest = max((len(row[at]) for row in shown), default=0)
        table.add_column(title, overflow="ellipsis", no_wrap=True, width=max(len(title), min(most, longest)))
    table.add_column("answer", overflow="ellipsis", no_wrap=True, ratio=1)
    for row in shown:
        # Model output is untrusted: `Text` shows markup instead of obeying it.
        table.add_row(*map(Text, row))
    console.print(table)
    for line in lines(manifest):
        console.print(line, highlight=False)
    bad = f"; failed rows: {child(path, ERRORS)} {_meaning(manifest['errors'])}" if rows["failed"] else ""
    results = ", ".join(child(path, name) for name in (DATA, REPORT, MANIFEST))
    console.print(f"Results: {results}{bad}", highlight=False, markup=False, soft_wrap=True)


def warn_if_empty(manifest: dict[str, Any], console: Console) -> None:
    if not manifest["rows"]["total"]:
        warn(console, f"There was nothing to do: the input has no rows ({_inputs(manifest)}).")


def _inputs(manifest: dict[str, Any]) -> str:
    files = manifest["input"]["files"]
    more = f" and {counted(len(files) - 1, 'more file')}" if len(files) > 1 else ""
    return f"{files[0]['path']}{more}" if files else "no files"


def _meaning(errors: dict[str, int]) -> str:
    """The link to the explanation of the most frequent error type."""
    return see_type(max(errors, key=lambda name: errors[name]))
