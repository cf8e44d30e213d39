"""`eagleray show`: shows conversations with their answers in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, islice
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from engines.errors import ConfigError, nearest
from engines.text import counted, visible
from engines.types import called
from jobs.reading import (
    Arguments,
    Output,
    Place,
    StoredRow,
    StoredRows,
    brief,
    number,
    open_output,
    print_json,
    say,
    steady,
)
from pipeline.output.json_lines import JSON_TEXT
from pipeline.report.task_values import values_of, values_text
from pipeline.storage.ledger import COMPLETION_COLUMNS

LIMIT = 5
ROLES = {"system": "magenta", "developer": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}
OURS = {"id", "index", "messages", "key", "done_at", *COMPLETION_COLUMNS}
# Maximum number of ids in memory, among which the nearest one is found.
IDS = 10_000


def main(argv: list[str]) -> int:
    """Shows rows. Returns the exit status."""
    what = "Conversations with their answers. If the run is not complete: the answers that it has so far."
    parser = Arguments("show", what, "out\nout --id q17 --id q18\nout --failed --limit 20\nout --row 1000 --json")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--id", action="append", help="show the row with this id (can be repeated)")
    which.add_argument("--row", type=number(1), help="show this row of the input; the first row is 1")
    which.add_argument("--index", type=number(0), help="the same by the column index, in which the first row is 0")
    which.add_argument("--failed", action="store_true", help="show only rows that failed")
    parser.add_argument("--limit", type=number(1), default=LIMIT, help=f"maximum number of rows (default: {LIMIT})")
    return parser.run(argv, _run)


def _run(args: argparse.Namespace, console: Console) -> int:
    out = open_output(args.OUT)
    count = 0
    # A run may merge files of the ledger while they are read: then they are read again before anything is printed.
    for row in _found(out, args) if out.manifest is not None else steady(lambda: list(_found(out, args))):
        count += 1
        if args.json:
            print_json(parsed(row), indent=None)
        else:
            _show(parsed(row), console)
    if args.json:
        return 0
    if not count:
        say(console, "No row failed." if args.failed else "No row is answered yet.")
    elif out.manifest is None:
        path = brief(out.config.get("dataset", {}).get("path") or "not known here")
        say(console, f"The run is not complete. Until it is, only the input has the prompts ({path}).", "dim")
    elif out.style == "openai_batch":
        say(
            console,
            "output.style=openai_batch keeps neither prompts, reasoning nor times; the input has the prompts.",
            "dim",
        )
    return 0


def _found(out: Output, args: argparse.Namespace) -> Iterator[StoredRow]:
    rows = StoredRows(out, failed=args.failed)
    if args.row is not None:
        return rows.fetch([_at_index(rows, args.row - 1, f"--row {args.row}", 1)])
    if args.index is not None:
        return rows.fetch([_at_index(rows, args.index, f"--index {args.index}", 0)])
    if args.id:
        return rows.fetch(_by_id(rows, args.id))
    wanted = (place for place, row in rows.scan("error") if row["error"] or not args.failed)
    return rows.fetch(list(islice(wanted, args.limit)))


def _at_index(rows: StoredRows, index: int, option: str, first: int) -> Place:
    """The place of a row. `option` is what the user typed, which counts from `first`."""
    if not rows.complete:
        raise ConfigError(f"{option}: rows have no number until the run is complete; name an --id")
    ends = [0, *accumulate(rows.sizes)]
    if index >= ends[-1]:
        raise ConfigError(f"{option} is beyond the last row, {ends[-1] - 1 + first}")
    part = bisect_right(ends, index) - 1
    return part, index - ends[part]


def _by_id(rows: StoredRows, ids: list[str]) -> list[Place]:
    wanted, places = set(ids), []
    seen: list[str] = []
    for place, row in rows.scan("id"):
        if row["id"] in wanted:
            wanted.remove(row["id"])
            places.append(place)
            if not wanted:
                return places
        elif len(seen) < IDS:
            seen.append(row["id"])
    so_far = "" if rows.complete else " among those answered so far"
    raise ConfigError(f"no row has the id {min(wanted)!r}{so_far}{nearest(min(wanted), seen)}")


def parsed(row: StoredRow) -> StoredRow:
    """The row with JSON text, as Parquet has it, replaced by its value."""
    in_json = {name for name in JSON_TEXT if isinstance(row.get(name), str)}
    return {name: json.loads(value) if name in in_json else value for name, value in row.items() if name != "key"}


# -- a row as a chat --------------------------------------------------------------------------------------------------


def _show(row: StoredRow, console: Console) -> None:
    place = f" · row {row['index'] + 1:,}" if row.get("index") is not None else ""  # people count from 1
    console.print(Rule(Text(f"{brief(row['id'], 60)}{place}", "bold"), align="left"))
    values = {} if row.get("response") is not None or row.get("error") else values_of(row)
    own = {name: value for name, value in row.items() if name not in OURS and name not in values and value is not None}
    for name, value in own.items():
        say(console, f"{brief(name, 40)}: {brief(value)}", "dim")
    error = row.get("error")
    messages = list(row.get("messages") or [])
    is_answered = messages and not error and not values and messages[-1].get("role") == "assistant"
    last = messages.pop() if is_answered else None
    for message in messages:
        show_message(message, console)
    if row.get("reasoning"):
        _speech("reasoning", "dim", row["reasoning"], console, "dim italic")
    if error:
        status = f" (status {error['status']})" if error.get("status") else ""
        _speech(f"error: {error['type']}{status}", "red", error["message"], console, "red")
    elif values:
        _speech("result", ROLES["assistant"], values_text(values), console)
    else:
        show_message(last or {"content": row.get("response"), "tool_calls": row.get("tool_calls")}, console)
        for at, choice in enumerate((row.get("choices") or [])[1:], 2):
            _speech(f"answer {at}", ROLES["assistant"], (choice.get("message") or {}).get("content") or "", console)
    say(console, figures(row), "dim")
    console.print()


def show_message(message: dict[str, Any], console: Console) -> None:
    """Prints one message: its text, its other content and its tool calls."""
    role = str(message.get("role") or "assistant")
    content, name = message.get("content"), message.get("name") or message.get("tool_call_id")
    texts = [content] if isinstance(content, str) else [_part(part) for part in content or []]
    for call in message.get("tool_calls") or []:
        tool, given = called(call)
        texts.append(f"→ {tool}({given})  [{call.get('id')}]")
    _speech(role + (f" {brief(name, 40)}" if name else ""), ROLES.get(role, "white"), "\n".join(texts), console)


def _part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        return str(part.get("text"))
    return f"[{brief(part, 100)}]"


def _speech(who: str, colour: str, text: str, console: Console, style: str = "") -> None:
    console.print(Text(visible(who), f"bold {colour}"))
    console.print(Padding(Text(visible(text), style), (0, 0, 0, 2), expand=False))


def figures(row: StoredRow) -> str:
    """The finish reason of a row, its tokens, cost, time and attempts, and the engine and model that answered."""
    usage = row.get("usage") or {}
    cached = f" ({usage['cached_input']:,} cached)" if usage.get("cached_input") else ""
    parts = [
        row.get("finish_reason"),
        f"{counted(usage['input'], 'token')} in{cached}, {usage['output']:,} out" if usage else None,
        f"${row['cost_usd']:.4g}" if row.get("cost_usd") else None,
        f"{row['latency_s']:.2f} s" if row.get("latency_s") else None,
        f"{row['attempts']} attempts" if (row.get("attempts") or 0) > 1 else None,
        " ".join(filter(None, (row.get("engine"), row.get("model") and brief(row["model"], 60)))),
    ]
    return " · ".join(text for text in parts if text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
