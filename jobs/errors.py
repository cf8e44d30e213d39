"""`eagleray errors`: why rows failed, what that means, and how to ask them again."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from engines.text import visible
from jobs.guide import see_type
from jobs.reading import Arguments, Output, StoredRows, brief, number, open_output, print_json, say, steady

LIMIT = 5
EXAMPLES = 3
# Messages that no pattern joins must not fill the memory.
PATTERNS = 5_000

# type -> what it means and what to do. Where nothing is said of asking again, that may do.
ADVICE = {
    "invalid_input": "The row cannot be asked: correct it in the input (the message names file and line).",
    "context_length": "Prompt and answer do not fit into the model's context: shorten the row or lower "
    "generation.max_tokens; eagleray plan finds such rows.",
    "content_filter": "The provider or the model refused the content: another model may take it (engine.fallback=[…]).",
    "auth": "The key was refused: look at the variable that engine.api_key_env names.",
    "not_found": "The server does not know the model or the address: look at engine.model and engine.base_url.",
    "bad_request": "The server refused the request as it was: the message says which parameter; look at generation and "
    "engine.extra_body.",
    "rate_limit": "The provider's limit or quota was hit for good: set engine.requests_per_minute to your limit, or wait.",
    "server": "The server failed again and again: asking later often works, and so may engine.max_retries.",
    "timeout": "No answer came in time: raise engine.timeout_s, or lower generation.max_tokens or engine.max_concurrency.",
    "connection": "The server could not be reached: look at engine.base_url and the network, then ask again.",
    "bad_response": "What came back was no answer as the API describes it: asking again may help.",
    "schema_mismatch": "The answer does not keep to generation.response_format: raise generation.max_tokens, or "
    "simplify the schema.",
    "engine_crash": "The engine's process died twice with this row in it: it may be too long for the memory.",
    "cancelled": "The row was cancelled before it was answered: asking again is all it takes.",
    "budget": "The budget was used up before this row: raise run.budget_usd.",
}

_QUOTED = re.compile(r"""'[^']{1,200}'|"[^"]{1,200}\"""")
# Words with a digit in them: numbers, ids of requests, hashes, places such as in.jsonl:17.
_NUMBER = re.compile(r"\b[\w-]*\d[\w.-]*\b")


def pattern_of(message: str) -> str:
    """A message without what is particular to one row, so that equal troubles look equal."""
    return _NUMBER.sub("#", _QUOTED.sub("'…'", brief(message, 1000)))


@dataclass(slots=True)
class Kind:
    """The failures that have one message, but for its numbers."""

    pattern: str
    first: str  # the whole message of the first one
    rows: int = 0
    ids: list[str] = field(default_factory=list)


def main(argv: list[str]) -> int:
    """Shows failures."""
    what = "Failed rows by type and message, and the command that asks them again. Works while a run goes on."
    parser = Arguments("errors", what, "out\nout --limit 20\ns3://bucket/out --json")
    parser.add_argument("--limit", type=number(1), default=LIMIT, help=f"messages shown of each type (default: {LIMIT})")
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
    so_far = "" if out.manifest is not None else " so far"
    of = f" of {out.manifest['rows']['total']:,}" if out.manifest is not None else ""
    say(console, f"{out.path}: {failed:,}{of} rows failed{so_far}.", "bold" if failed else "bold green")
    for type, kinds in found.items():
        _show(type, kinds, args.limit, console)
    if unread:
        say(console, f"\n{_rows(unread)} of the input cannot be read; the reasons are told once the run is complete.")
    if failed and out.live:
        say(console, "\nThe run goes on; when it is over, the same command asks the failed ones again.")
    elif failed:
        _show_again(out, again, console)
    return 0


def collect(out: Output) -> dict[str, list[Kind]]:
    """type -> its kinds; of both, those with the most rows first."""
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


def _show(type: str, kinds: list[Kind], limit: int, console: Console) -> None:
    console.print()
    console.print(Text(visible(type), "bold red") + Text(f"  {_rows(_count(kinds))}", "not bold default"))
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
        say(console, f"           and {_rows(_count(rest))} with {len(rest):,} other messages (--limit)", "dim")


def _show_again(out: Output, again: str | None, console: Console) -> None:
    say(console, "\nOnly the failed rows are asked again, into the same output, by")
    say(console, f"  {again or 'the same command as before'}", "bold")
    if again and "***" in again:
        say(console, "  (with the secret in place of ***)", "dim")
    if out.manifest is not None:
        say(console, "and into an output of their own, as another engine may answer them, with")
        say(console, f"  dataset.path={out.path.rstrip('/')}/errors output.path=…", "bold")


def _rows(count: int) -> str:
    return f"{count:,} row" + "s" * (count != 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
