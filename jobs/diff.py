"""`eagleray diff`: compares two outputs row by row, for example of two models or two prompts."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.errors import ConfigError
from engines.text import visible
from jobs.reading import Arguments, Output, StoredRow, StoredRows, brief, number, open_output, print_json, say, steady
from jobs.show import figures, parsed
from pipeline.storage.exact_json import loads

LIMIT = 5
# Longer texts are cut: the time of a comparison by words grows with the square of their length.
WORDS = 1_500
# The part of each row that stays in memory, about 60 bytes: enough to compare all rows and to fetch the rows to show.
ROW = np.dtype([("place", "i8", 2), ("id", "i8"), ("index", "i8"), ("answer", "i8"), ("failed", "?"), ("reason", "i4"),
                ("input", "f8"), ("output", "f8"), ("latency", "f8")])  # fmt: skip
COLUMNS = ("id", "index", "response", "tool_calls", "error", "usage", "latency_s", "finish_reason")
TableLine = tuple[str, ...]
Positions = npt.NDArray[np.int64]


class Side:
    """One of the two outputs, with a table of its rows."""

    def __init__(self, out: Output) -> None:
        self.out, self.rows = out, StoredRows(out)
        self.reasons: dict[str, int] = {}
        self.table = np.fromiter(self._lines(), ROW)

    def _lines(self) -> Iterator[tuple[Any, ...]]:
        for place, row in self.rows.scan(*COLUMNS):
            usage, error = row.get("usage") or {}, row["error"]
            reason = error["type"] if error else str(row.get("finish_reason"))
            code = self.reasons.setdefault(reason, len(self.reasons))
            calls = row.get("tool_calls") or None  # JSON text in Parquet
            answer = hash((row.get("response"), str(loads(calls.encode()) if isinstance(calls, str) else calls)))
            values = (usage.get("input"), usage.get("output"), row.get("latency_s"))
            unknown = (np.nan if value is None else value for value in values)
            yield place, hash(row["id"]), row.get("index", -1), answer, bool(error), code, *unknown

    def fetch(self, at: Positions) -> list[StoredRow]:
        """The complete rows at these positions of the table, in this order."""
        places = [(int(part), int(row)) for part, row in self.table["place"][at]]
        whole = dict(zip(sorted(places), map(parsed, self.rows.fetch(places)), strict=True))
        return [whole[place] for place in places]

    def summary(self, at: Positions, both: npt.NDArray[np.bool_]) -> dict[str, Any]:
        """Figures of the rows at these positions. Tokens and times count only rows that `both` outputs answered."""
        reasons = Counter(self.table["reason"][at].tolist())
        table = self.table[at[both]]
        seconds = table["latency"][~np.isnan(table["latency"])]
        return {
            "output": self.out.path,
            "complete": self.rows.complete,
            "input_tokens": int(np.nansum(table["input"])),
            "output_tokens": int(np.nansum(table["output"])),
            "latency_s": dict(zip(("median", "p95"), np.percentile(seconds, (50, 95)), strict=True))
            if len(seconds)
            else {},
            "cost_usd": self.out.manifest and self.out.manifest["cost_usd"],
            "finish_reasons": {name: reasons[code] for name, code in self.reasons.items() if reasons[code]},
        }


def main(argv: list[str]) -> int:
    """Compares two outputs. Returns the exit status."""
    what = "Compare two outputs row by row: answers, tokens, times and cost. Rows are matched by id, or by place."
    parser = Arguments("diff", what, "out/a out/b\nout/a out/b --id q17\nout/a out/b --limit 50 --json", ("OUT_A", "OUT_B"))
    parser.add_argument("--id", action="append", help="show only this row, also if it is equal (can be repeated)")
    parser.add_argument(
        "--limit", type=number(0), default=LIMIT, help=f"maximum number of differing rows to show (default: {LIMIT})"
    )
    return parser.run(argv, _run)


def _run(args: argparse.Namespace, console: Console) -> int:
    outs = [open_output(args.OUT_A), open_output(args.OUT_B)]
    a, b = (steady(Side, out) for out in outs)
    by, at_a, at_b = matched(a, b)
    summary, differ = compare(a, b, at_a, at_b)
    summary |= {"matched_by": by, "settings": _settings(*outs)}
    chosen = differ[: args.limit]
    if args.id:
        wanted = {hash(id): id for id in args.id}
        chosen = np.flatnonzero(np.isin(a.table["id"][at_a], list(wanted)))
        if missing := wanted.keys() - set(a.table["id"][at_a[chosen]].tolist()):
            raise ConfigError(f"the two outputs have no common row with the id {wanted[missing.pop()]!r}")
    pairs = list(zip(a.fetch(at_a[chosen]), b.fetch(at_b[chosen]), strict=True))
    if args.json:
        summary["shown"] = [{"a": {name: x.get(name) for name in COLUMNS}, "b": {name: y.get(name) for name in COLUMNS}}
                         for x, y in pairs]  # fmt: skip
        print_json(summary)
        return 0
    _show_summary(summary, outs, console)
    for x, y in pairs:
        _show_pair(x, y, console)
    if not args.id and len(differ) > len(pairs):
        say(console, f"{len(differ) - len(pairs):,} more rows differ (--limit).", "dim")
    return 0


def _settings(a: Output, b: Output) -> dict[str, list[Any]]:
    """The configuration keys that can change an answer and differ between the two outputs."""
    one, two = (dict(_leaves("", out.config)) for out in (a, b))
    return {
        name: [one.get(name), two.get(name)]
        for name in dict.fromkeys([*one, *two])
        if one.get(name) != two.get(name) and name.partition(".")[0] in ("engine", "generation", "dataset")
    }


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(f"{path}.{name}".lstrip("."), item)
    elif value is not None:
        yield path, value


def matched(a: Side, b: Side) -> tuple[str, Positions, Positions]:
    """How the rows were matched, and the positions of the pairs in both tables, in the order of the first."""
    by, name = "id", "id"
    unique = all(len(np.unique(side.table["id"])) == len(side.table) for side in (a, b))
    if not unique or not len(np.intersect1d(a.table["id"], b.table["id"])):
        why = "no id is in both" if unique else "ids repeat"
        if not (a.rows.complete and b.rows.complete):
            raise ConfigError(f"rows cannot be matched: {why}, and they have no places until both runs are complete")
        by, name = f"place in the input, because {why}", "index"
    _, at_a, at_b = np.intersect1d(a.table[name], b.table[name], return_indices=True)
    order = np.argsort(at_a)
    return by, at_a[order], at_b[order]


def compare(a: Side, b: Side, at_a: Positions, at_b: Positions) -> tuple[dict[str, Any], Positions]:
    """The figures of the comparison, and the indices of the pairs that differ."""
    failed_a, failed_b = a.table["failed"][at_a], b.table["failed"][at_b]
    both = ~failed_a & ~failed_b
    equal = both & (a.table["answer"][at_a] == b.table["answer"][at_b])
    counts = {
        "a": len(a.table), "b": len(b.table), "both": len(at_a), "equal": equal.sum(), "differ": (both & ~equal).sum(),
        "failed_only_in_a": (failed_a & ~failed_b).sum(), "failed_only_in_b": (failed_b & ~failed_a).sum(),
        "failed_in_both": (failed_a & failed_b).sum(), "only_in_a": len(a.table) - len(at_a),
        "only_in_b": len(b.table) - len(at_b),
    }  # fmt: skip
    summary = {"rows": {k: int(v) for k, v in counts.items()}, "a": a.summary(at_a, both), "b": b.summary(at_b, both)}
    return summary, np.flatnonzero((both & ~equal) | (failed_a != failed_b))


# -- showing ----------------------------------------------------------------------------------------------------------


def _show_summary(summary: dict[str, Any], outs: list[Output], console: Console) -> None:
    rows, a, b = summary["rows"], summary["a"], summary["b"]
    for letter, out in zip("AB", outs, strict=True):
        so_far = "" if out.manifest is not None else " (not complete: what is answered so far)"
        lacks = ", output.style=openai_batch: without prompts and times" if out.style == "openai_batch" else ""
        say(console, f"{letter}  {out.path}{so_far}{lacks}", "bold")
    if summary["settings"]:
        console.print(_grid("set differently", [(k, *map(_value, pair)) for k, pair in summary["settings"].items()]))
    note = "" if summary["matched_by"] == "id" else f", matched by {summary['matched_by']}"
    say(console, f"\n{rows['both']:,} rows in both{note}", "bold")
    names = ("equal", "differ", "failed_only_in_a", "failed_only_in_b", "failed_in_both", "only_in_a", "only_in_b")
    for name in names:
        if rows[name] or name in names[:2]:
            say(console, f"  {name.replace('_', ' '):<18}{rows[name]:>9,}")
    lines: list[TableLine] = []
    for name in ("input_tokens", "output_tokens"):
        lines.append((name.replace("_", " "), *_delta(a[name], b[name], "{:,.0f}")))
    for name in (name for name in a["latency_s"] if name in b["latency_s"]):
        lines.append((f"latency, {name}", *_delta(a["latency_s"][name], b["latency_s"][name], "{:,.2f} s")))
    if a["cost_usd"] and b["cost_usd"]:
        lines.append(("cost of all rows", *_delta(a["cost_usd"], b["cost_usd"], "{:,.4f} $")))
    for name in sorted({*a["finish_reasons"], *b["finish_reasons"]}):
        counts = [side["finish_reasons"].get(name, 0) for side in (a, b)]
        lines.append((f"finish {brief(name, 30)}", *_delta(counts[0], counts[1], "{:,.0f}")))
    console.print(_grid(f"of {rows['equal'] + rows['differ']:,} rows answered in both", lines, "right"))


def _grid(title: str, lines: list[TableLine], justify: Any = "left") -> Table:
    table = Table(title, box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("A", "B", "B - A")[: len(lines[0]) - 1]:
        table.add_column(column, justify=justify, overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def _value(value: Any) -> str:
    return "-" if value is None else brief(value, 120)


def _delta(one: float, two: float, form: str) -> tuple[str, str, str]:
    share = f" ({100 * (two - one) / one:+.0f}%)" if one else ""
    return form.format(one), form.format(two), form.replace("{:", "{:+").format(two - one) + share


def _show_pair(one: StoredRow, two: StoredRow, console: Console) -> None:
    same = "" if one["id"] == two["id"] else f" / {brief(two['id'], 60)}"
    console.print()
    say(console, f"{brief(one['id'], 60)}{same}", "bold")
    table = Table("A", "B", expand=True, header_style="dim")
    for column in table.columns:
        column.ratio, column.overflow = 1, "fold"
    marks = not console.color_system
    asked = _asked(one), _asked(two)
    if asked[0] == asked[1] or not all(asked):
        say(console, brief(asked[0] or asked[1], 300), "cyan")
    else:
        table.add_row(*word_diff(*asked, marks), end_section=True)
    table.add_row(*word_diff(_answer(one), _answer(two), marks))
    table.add_row(Text(figures(one), "dim"), Text(figures(two), "dim"))
    console.print(table)


def _asked(row: StoredRow) -> str:
    """The last system message and the last user message of a row."""
    texts = {m["role"]: m["content"] for m in row.get("messages") or [] if m.get("role") in ("system", "user")}
    return "\n".join(text if isinstance(text, str) else brief(text) for _, text in sorted(texts.items()))


def _answer(row: StoredRow) -> str:
    if row["error"]:
        return f"({row['error']['type']}: {row['error']['message']})"
    calls = [f"→ {call['function']['name']}({call['function']['arguments']})" for call in row.get("tool_calls") or []]
    return "\n".join([row.get("response") or "", *calls]).strip()


def word_diff(one: str, two: str, marks: bool) -> tuple[Text, Text]:
    """Two texts with the words that differ highlighted: by colour, or by `marks` on a terminal without colours."""
    words = [re.findall(r"(?:\w+|[^\w\s])\s*", visible(text).strip()) for text in (one, two)]
    cut = [[*found[:WORDS], f" … ({len(found) - WORDS:,} words more)"] if len(found) > WORDS else found for found in words]
    bare = [[word.strip() for word in found] for found in cut]  # line breaks do not count as a difference
    texts = Text(), Text()
    kinds = ("[-{}-]{}", "bold red"), ("{{+{}+}}{}", "bold green")
    for what, *ends in difflib.SequenceMatcher(None, bare[0], bare[1], autojunk=False).get_opcodes():
        for at, (text, (mark, colour)) in enumerate(zip(texts, kinds, strict=True)):
            part = "".join(cut[at][ends[2 * at] : ends[2 * at + 1]])
            if marks and part and what != "equal":
                part = mark.format(part.rstrip(), part[len(part.rstrip()) :])
            text.append(part, None if what == "equal" else colour)
    return texts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
