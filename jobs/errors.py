"""`eagleray errors`: shows why rows failed, what to do, and the command that sends them again."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from engines.text import counted, visible
from jobs.guide import see_type
from jobs.reading import Arguments, Output, StoredRows, brief, number, open_output, print_json, say, steady
from pipeline.report.advice import ADVICE
from pipeline.storage.filesystem import child
from pipeline.storage.output_files import ERRORS

LIMIT = 5
EXAMPLES = 3
# Maximum number of patterns in memory; further messages are counted together.
PATTERNS = 5_000

_QUOTED = re.compile(r"""'[^']{1,200}'|"[^"]{1,200}\"""")
# Words with a digit in them: numbers, ids of requests, hashes, places such as in.jsonl:17.
_NUMBER = re.compile(r"\b[\w-]*\d[\w.-]*\b")


def pattern_of(message: str) -> str:
    """A message without numbers, ids and quoted texts, so that messages about the same problem are equal."""
    return _NUMBER.sub("#", _QUOTED.sub("'…'", brief(message, 1000)))


@dataclass(slots=True)
class Kind:
    """Failed rows whose messages have the same pattern."""

    pattern: str
    first: str  # the whole message of the first one
    rows: int = 0
    ids: list[str] = field(default_factory=list)


def main(argv: list[str]) -> int:
    """Shows failed rows. Returns the exit status."""
    what = "Failed rows by type and message, and the command that sends them again. Also works during a run."
    parser = Arguments("errors", what, "out\nout --limit 20\ns3://bucket/out --json")
    parser.add_argument(
        "--limit", type=number(1), default=LIMIT, help=f"maximum number of messages to show of each type (default: {LIMIT})"
    )
    return parser.run(argv, _run)


def _run(args: argparse.Namespace, console: Console) -> int:
    out = open_output(args.OUT)
    found: dict[str, list[Kind]] = steady(collect, out)
    again = out.command(retry_failed=True)
    failed = sum(map(_count, found.values()))
    if args.json:
        types = {
            type: {"rows": _count(kinds), "advice": ADVICE.get(type),
                   "messages": [{"pattern": k.pattern, "rows": k.rows, "ids": k.ids, "first": k.first} for k in kinds]}
            for type, kinds in found.items()
        }  # fmt: skip
        print_json({"output": out.path, "complete": out.manifest is not None, "failed": failed, "types": types,
                    "command": again})  # fmt: skip
        return 0
    unread = (out.run or {}).get("status", {}).get("invalid", 0)
    done = out.manifest is not None
    unit = "row" if done else "request"  # the ledger has requests; duplicates are known when the run is complete
    text = f"{failed:,} of {counted(out.manifest['rows']['total'], 'row')} failed" if out.manifest is not None else (
        f"{counted(failed, unit)} failed so far, duplicates not counted"
    )  # fmt: skip
    say(console, f"{out.path}: {text}.", "bold" if failed else "bold green")
    for type, kinds in found.items():
        _show(type, kinds, args.limit, unit, console)
    if unread:
        say(console, f"\n{counted(unread, 'row')} of the input cannot be read. The reasons are shown after the run.")
    if failed and out.live:
        say(console, "\nThe run is in progress. To send the failed rows again, wait for its end and repeat its command.")
    elif failed:
        _show_again(out, again, console)
    return 0


def collect(out: Output) -> dict[str, list[Kind]]:
    """Error type -> its kinds of failures. Types and kinds with the most rows come first."""
    found: dict[str, dict[str, Kind]] = {}
    patterns = 0
    for _, row in StoredRows(out, failed=True).scan("id", "error"):
        if not (error := row["error"]):
            continue
        kinds, message = found.setdefault(str(error["type"]), {}), str(error["message"] or "")
        pattern = pattern_of(message)
        if pattern not in kinds and patterns >= PATTERNS:
            pattern = "(other messages)"
        if pattern not in kinds:
            patterns += 1
            kinds[pattern] = Kind(pattern, message[:2000])
        kind = kinds[pattern]
        kind.rows += 1
        if len(kind.ids) < EXAMPLES:
            kind.ids.append(str(row["id"]))
    ordered = {type: sorted(kinds.values(), key=lambda kind: -kind.rows) for type, kinds in found.items()}
    return dict(sorted(ordered.items(), key=lambda item: -_count(item[1])))


def _count(kinds: list[Kind]) -> int:
    return sum(kind.rows for kind in kinds)


def _show(type: str, kinds: list[Kind], limit: int, unit: str, console: Console) -> None:
    console.print()
    console.print(Text(visible(type), "bold red") + Text(f"  {counted(_count(kinds), unit)}", "not bold default"))
    if type in ADVICE:
        say(console, f"  {ADVICE[type]} {see_type(type)}")
    for kind in kinds[:limit]:
        message = brief(kind.first, 300)
        say(console, f"  {kind.rows:>7,}  {kind.pattern if kind.rows > 1 else message}", "yellow")
        if kind.rows > 1 and message != kind.pattern:
            say(console, f"           first: {message}", "dim")
        more = ", …" if kind.rows > len(kind.ids) else ""
        say(console, "           ids: " + ", ".join(brief(id, 60) for id in kind.ids) + more, "dim")
    if rest := kinds[limit:]:
        say(
            console,
            f"           and {counted(_count(rest), unit)} with {counted(len(rest), 'other message')} (--limit)",
            "dim",
        )


def _show_again(out: Output, again: str | None, console: Console) -> None:
    say(console, "\nThis command sends only the failed rows again. It writes into the same output:")
    say(console, f"  {again or 'the same command as before'}", "bold")
    if again and "***" in again:
        say(console, "  (replace *** with the secret)", "dim")
    if out.manifest is not None:
        say(console, "To send them to another engine and into another output, use")
        failed = shlex.quote(f"dataset.path={child(out.path, ERRORS)}")
        say(console, f"  eagleray infer engine=… {failed} output.path=…", "bold")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
