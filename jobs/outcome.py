"""Prints the result of a run: the counts, the first answers and the paths of the results."""

from __future__ import annotations

import json
from typing import Any

import pyarrow.fs as pafs
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.guide import see_type
from pipeline.storage.filesystem import resolve
from pipeline.storage.retry import patiently

SHOWN = 5


def show_outcome(manifest: dict[str, Any], path: str, console: Console) -> None:
    """Prints a table of the first rows, and the figures of the run."""
    rows, tokens, run = manifest["rows"], manifest["tokens"], manifest["this_run"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    shown = [[one_line(cell) for cell in row] for row in _first_rows(manifest, path)]
    for at, (title, most) in enumerate((("id", 18), ("last message", 30))):  # the answer takes the remaining width
        longest = max((len(row[at]) for row in shown), default=0)
        table.add_column(title, overflow="ellipsis", no_wrap=True, width=max(len(title), min(most, longest)))
    table.add_column("answer", overflow="ellipsis", no_wrap=True, ratio=1)
    for row in shown:
        # Model output is untrusted: `Text` shows markup instead of obeying it.
        table.add_row(*map(Text, row))
    console.print(table)
    failed = f", {rows['failed']:,} failed ({_errors(manifest['errors'])})" if rows["failed"] else ""
    console.print(
        f"{rows['done']:,} of {rows['total']:,} rows answered{failed}; {run['asked']:,} requests sent in this run; "
        f"{tokens['input']:,} tokens in, {tokens['output']:,} out{_cost(manifest)}.",
        highlight=False,
    )
    bad = f"; failed rows: {path}/errors {_meaning(manifest['errors'])}" if rows["failed"] else ""
    console.print(f"Results: {path}/data, {path}/report.html, {path}/manifest.json{bad}", highlight=False, soft_wrap=True)


def _cost(manifest: dict[str, Any]) -> str:
    """The cost of all answers in the output, of all runs; empty for engines on this machine, which cost nothing."""
    cost, as_of = manifest["cost_usd"], manifest.get("price_as_of")  # an older output has no date
    if cost is None:
        known, unknown = manifest.get("cost_known_usd"), manifest.get("cost_unknown_requests", 0)
        if known:
            return f"; ${known:,.4f}, and the unknown cost of {unknown:,} requests"
        return "; the cost is not known"
    of = f" by the list price of {as_of}" if as_of else ""
    return f"; ${cost:,.4f}{of}" if cost else ""


def _errors(errors: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(errors.items()))


def _meaning(errors: dict[str, int]) -> str:
    """The link to the explanation of the most frequent error type."""
    return see_type(max(errors, key=lambda name: errors[name]))


def _first_rows(manifest: dict[str, Any], path: str) -> list[tuple[str, str, str]]:
    name = next((name for name in manifest["files"] if name.startswith("data/")), None)
    if name is None or manifest["config"]["output"]["style"] != "eagleray":
        return []
    fs, root = resolve(path)
    rows = patiently(lambda: _head(fs, f"{root}/{name}"))
    return [(row["id"], _last_message(row["messages"]), _answer(row)) for row in rows]


def _head(fs: pafs.FileSystem, path: str) -> list[dict[str, Any]]:
    """The first rows of an output part."""
    with fs.open_input_file(path) as file:
        if path.endswith(".parquet"):
            columns = ["id", "messages", "response", "error.message"]
            batch = next(pq.ParquetFile(file).iter_batches(batch_size=SHOWN, columns=columns), None)
            return batch.to_pylist() if batch is not None else []
        # 1 MiB holds several lines, except for very long ones: only complete lines are shown.
        head = file.read(1 << 20).split(b"\n")
        return [json.loads(line) for line in head[:-1][:SHOWN]]


def _last_message(messages: Any) -> str:
    found = json.loads(messages) if isinstance(messages, str) else messages or []
    asked = [m for m in found if m["role"] == "user"]
    return str(asked[-1]["content"]) if asked else ""


def _answer(row: dict[str, Any]) -> str:
    return f"({row['error']['message']})" if row["error"] else row["response"] or ""


def one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]
