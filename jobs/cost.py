"""`eagleray cost`: adds up the cost of several runs, by run, lane, engine, model and day."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.text import counted
from jobs.reading import Arguments, Output, brief, open_output, print_json, say, steady
from pipeline.output.spending import Part, Spent, grouped, of_manifest, read_spending
from pipeline.storage.filesystem import canonical_place, exists
from pipeline.storage.output_files import BATCHES

BY = ("run", "lane", "engine", "model", "day")
DEFAULT_BY = ("run", "lane", "model")


@dataclass(frozen=True, slots=True)
class Run:
    """The spending of one output."""

    out: Output
    parts: dict[Part, Spent]
    in_batches: int  # requests in batches that are at the provider

    @property
    def state(self) -> str:
        return "complete" if self.out.manifest is not None else "running" if self.out.live else "stopped"


def main(argv: list[str]) -> int:
    """Adds up costs. Returns the exit status."""
    what = (
        "The cost of all requests in the ledgers of these outputs, with retries. An unknown cost is reported as unknown.\n"
        "lane: live, or batch for a provider's batch API. day: the day of the answer in UTC."
    )
    examples = "out\nout/* --by model\nout/a out/b --by run,day --json"
    parser = Arguments("cost", what, examples, outputs=())
    parser.add_argument("OUT", nargs="+", help="output directories: local paths, s3://… or other URLs")
    parser.add_argument("--by", type=_by, default=DEFAULT_BY, metavar="NAMES",
                        help=f"one line for each of these: {', '.join(BY)} (default: {','.join(DEFAULT_BY)})")  # fmt: skip
    return parser.run(argv, _run)


def _by(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if wrong := next((name for name in names if name not in BY), None):
        raise argparse.ArgumentTypeError(f"there is no '{wrong}'; choose from {', '.join(BY)}")
    return names


def _run(args: argparse.Namespace, console: Console) -> int:
    outs = {canonical_place(out.path): out for out in map(open_output, args.OUT)}  # one that is named twice counts once
    runs = [steady(_look, out) for out in outs.values()]
    groups = grouped([(run.out.path, part, spent) for run in runs for part, spent in run.parts.items()], args.by)
    total = Spent()
    for spent in groups.values():
        total.add(spent)
    ordered = sorted(groups.items(), key=lambda item: _order(item[0], args.by, [run.out.path for run in runs]))
    if args.json:
        print_json({
            "by": args.by,
            "groups": [dict(zip(args.by, key, strict=True)) | _values(spent) for key, spent in ordered],
            "total": _values(total),
            "runs": [{"output": run.out.path, "state": run.state, "requests_in_batches": run.in_batches} for run in runs],
        })  # fmt: skip
        return 0
    _show(ordered, total, args.by, console)
    for run in runs:
        if run.in_batches:
            waiting = counted(run.in_batches, "request is", "requests are")
            text = f"{run.out.path}: {waiting} in batches at the provider; the cost is not known yet."
            say(console, text, "yellow")
        elif run.state == "running":
            say(console, f"{run.out.path}: the run is in progress; this is the cost so far.", "yellow")
    if total.unknown:
        text = f"The cost of {counted(total.unknown, 'request')} is unknown and not in the sums of US$."
        say(console, text, "yellow")
    return 0


def _look(out: Output) -> Run:
    parts, manifest = read_spending(out.fs, out.root), out.manifest
    unknown = any(spent.unknown for spent in parts.values())
    if manifest is not None and manifest["rows"].get("requests"):
        is_older = unknown and manifest.get("cost_usd") is not None  # its version recorded no costs in the ledger
        parts = of_manifest(manifest) if is_older or not parts else parts
    in_batches = 0
    if exists(out.fs, f"{out.root}/{BATCHES}"):
        from pipeline.executors.batch.store import BatchStore

        in_batches = sum(batch.rows for batch in BatchStore(out.fs, out.root).open)
    return Run(out, parts, in_batches)


def _order(key: tuple[str | None, ...], by: Sequence[str], paths: list[str]) -> list[Any]:
    """Runs in the order of the arguments, everything else by name."""
    return [paths.index(str(value)) if name == "run" else str(value or "") for name, value in zip(by, key, strict=True)]


def _values(spent: Spent) -> dict[str, Any]:
    return {
        "requests": spent.requests,
        "attempts": spent.attempts,
        "tokens": {"input": spent.input, "cached_input": spent.cached_input, "output": spent.output},
        "cost_usd": None if spent.unknown else spent.cost_usd,
        "cost_known_usd": spent.cost_usd,
        "cost_unknown_requests": spent.unknown,
    }


def _show(
    groups: Sequence[tuple[tuple[str | None, ...], Spent]], total: Spent, by: Sequence[str], console: Console
) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_footer=len(groups) > 1, footer_style="bold")
    for number, name in enumerate(by):
        table.add_column("day (UTC)" if name == "day" else name, "total" if not number else "", overflow="fold")
    for name, footer in zip(("requests", "input tokens", "output tokens", "US$"), _cells(total), strict=True):
        table.add_column(name, footer, justify="right")
    for key, spent in groups:
        table.add_row(*(Text(brief(value, 120) if value else "-") for value in key), *_cells(spent))
    console.print(table)


def _cells(spent: Spent) -> tuple[str, str, str, str]:
    known = f"{spent.cost_usd:,.4f}" if spent.cost_usd < 1 else f"{spent.cost_usd:,.2f}"
    cost = f"{known} + unknown" if spent.unknown and spent.cost_usd else "unknown" if spent.unknown else known
    return f"{spent.requests:,}", f"{spent.input:,}", f"{spent.output:,}", cost


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
