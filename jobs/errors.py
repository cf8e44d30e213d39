"""`eagleray errors`: shows why rows failed, what to do, and the command that sends them again."""

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
# Maximum number of patterns in memory; further messages are counted together.
PATTERNS = 5_000

# Error type -> its meaning and what to do about it.
ADVICE = {
    "invalid_input": "The row is not a valid request: correct it in the input (the message names file and line).",
    "context_length": "The prompt and the answer do not fit into the model's context: shorten the row or lower "
    "generation.max_tokens; eagleray plan finds such rows.",
    "content_filter": "The provider or the model refused the content: another model may accept it (engine.fallback=[…]).",
    "auth": "The server refused the API key: check the environment variable that engine.api_key_env names.",
    "not_found": "The server does not know the model or the address: check engine.model and engine.base_url.",
    "bad_request": "The server refused the request: the message names the parameter; check the generation keys and "
    "engine.extra_body.",
    "rate_limit": "The provider's limit or quota was still reached after all retries: set engine.requests_per_minute to "
    "your limit, or wait.",
    "server": "The server failed at each attempt: send the rows again later, or raise engine.max_retries.",
    "timeout": "No answer arrived in time: raise engine.timeout_s; lower generation.max_tokens or engine.max_concurrency.",
    "connection": "The server could not be reached: check engine.base_url and the network, then send the rows again.",
    "bad_response": "The response was not an answer as the API describes it: send the rows again.",
    "schema_mismatch": "The answer does not match generation.response_format: raise generation.max_tokens, or simplify the "
    "schema.",
    "engine_crash": "The engine's process died twice while it worked on this row: the row may need too much memory.",
    "cancelled": "The row was cancelled before it was answered: send it again.",
    "budget": "The budget was used up before this row: raise run.budget_usd.",
}

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
    so_far = "" if out.manifest is not None else " so far"
    of = f" of {out.manifest['rows']['total']:,}" if out.manifest is not None else ""
    say(console, f"{out.path}: {failed:,}{of} rows failed{so_far}.", "bold" if failed else "bold green")
    for type, kinds in found.items():
        _show(type, kinds, args.limit, console)
    if unread:
        say(console, f"\n{_rows(unread)} of the input cannot be read; the reasons are shown when the run is complete.")
    if failed and out.live:
        say(console, "\nThe run is not finished. After it ends, run the same command to send the failed rows again.")
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
    say(console, "\nThis command sends only the failed rows again, into the same output:")
    say(console, f"  {again or 'the same command as before'}", "bold")
    if again and "***" in again:
        say(console, "  (replace *** by the secret)", "dim")
    if out.manifest is not None:
        say(console, "To send them to another engine, into another output, use its command with")
        say(console, f"  dataset.path={out.path.rstrip('/')}/errors output.path=…", "bold")


def _rows(count: int) -> str:
    return f"{count:,} row" + "s" * (count != 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
