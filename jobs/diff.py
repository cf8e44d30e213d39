"""`eagleray diff`: compares outputs row by row, for example of several models or prompts."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from string import ascii_uppercase
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from engines.errors import ConfigError
from jobs.diff_columns import ColumnValues, chosen_columns, compare_column
from jobs.diff_view import show_many, show_two
from jobs.reading import Arguments, Output, StoredRow, StoredRows, number, open_output, print_json, steady
from jobs.show import parsed
from pipeline.storage.exact_json import dumps, loads

LIMIT = 5
MOST_OUTPUTS = len(ascii_uppercase)
# The part of each row that stays in memory, about 60 bytes: enough to compare all rows and to fetch the rows to show. Each
# compared column takes 16 bytes more.
ROW = [("place", "i8", 2), ("id", "i8"), ("index", "i8"), ("answer", "i8"), ("failed", "?"), ("reason", "i4"),
       ("input", "f8"), ("output", "f8"), ("latency", "f8")]  # fmt: skip
COLUMNS = ("id", "index", "response", "tool_calls", "error", "usage", "latency_s", "finish_reason")
Positions = npt.NDArray[np.int64]


class Side:
    """One of the outputs. `read` makes a table of its rows."""

    def __init__(self, out: Output, labels: dict[str, dict[int, str]]) -> None:
        self.out, self.rows = out, StoredRows(out)
        self.values = ColumnValues(out, self.rows, labels)
        self.reasons: dict[str, int] = {}

    def read(self, columns: Sequence[str]) -> None:
        """Reads all rows, with the values of these columns."""
        more = [(f"{kind}{at}", type) for at in range(len(columns)) for kind, type in (("number", "f8"), ("code", "i8"))]
        self.table = np.fromiter(self._lines(columns), np.dtype([*ROW, *more]))

    def _lines(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        of_task = self.values.of_task
        for place, row in self.rows.scan(*dict.fromkeys([*COLUMNS, *of_task, *self.values.needed(columns)])):
            usage, error = row.get("usage") or {}, row["error"]
            finish = row.get("finish_reason")
            reason = error["type"] if error else "done" if of_task and finish is None else str(finish)
            code = self.reasons.setdefault(reason, len(self.reasons))
            calls = row.get("tool_calls") or None  # JSON text in Parquet
            found = dumps([row.get(name) for name in of_task])
            answer = hash((row.get("response"), found, str(loads(calls.encode()) if isinstance(calls, str) else calls)))
            values = (usage.get("input"), usage.get("output"), row.get("latency_s"))
            unknown = (np.nan if value is None else value for value in values)
            own = itertools.chain.from_iterable(self.values.of(row, columns))
            yield place, hash(row["id"]), row.get("index", -1), answer, bool(error), code, *unknown, *own

    def fetch(self, at: Positions) -> list[StoredRow]:
        """The complete rows at these positions of the table, in this order."""
        places = [(int(part), int(row)) for part, row in self.table["place"][at]]
        whole = dict(zip(sorted(places), map(parsed, self.rows.fetch(places)), strict=True))
        return [whole[place] for place in places]

    def summary(self, at: Positions, answered: npt.NDArray[np.bool_]) -> dict[str, Any]:
        """Figures of the rows at these positions. Tokens and times count only rows that are `answered` in all outputs."""
        reasons = Counter(self.table["reason"][at].tolist())
        table = self.table[at[answered]]
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
    """Compares outputs. Returns the exit status."""
    what = (
        "Compare two or more outputs row by row: answers, the columns of output.columns, tokens, times and cost.\n"
        "Rows are matched by id or by place in the input."
    )
    examples = (
        "out/a out/b\nout/a out/b --id q17\nout/a out/b out/c --limit 50 --json\nout/a out/b --column stars --column label"
    )
    parser = Arguments("diff", what, examples, ("OUT_A", "OUT_B"))
    parser.add_argument("OUT", nargs="*", help="more output directories")
    parser.add_argument("--id", action="append", help="show only this row, also if it is equal (can be repeated)")
    parser.add_argument("--column", action="append", metavar="NAME",
                        help="compare this column (can be repeated; default: the columns of output.columns)")  # fmt: skip
    parser.add_argument(
        "--limit", type=number(0), default=LIMIT, help=f"maximum number of differing rows to show (default: {LIMIT})"
    )
    return parser.run(argv, _run)


def _run(args: argparse.Namespace, console: Console) -> int:
    paths = [args.OUT_A, args.OUT_B, *args.OUT]
    if len(paths) > MOST_OUTPUTS:
        raise ConfigError(f"{len(paths)} outputs are too many: at most {MOST_OUTPUTS} are compared at once")
    outs = list(map(open_output, paths))
    sides, columns = steady(_read, outs, args.column)
    by, at = matched(sides)
    summary, differ = (compare if len(sides) == 2 else compare_many)(sides, at)
    summary |= {"matched_by": by, "settings": _settings(outs), "columns": _columns(sides, columns, at)}
    chosen = differ[: args.limit]
    if args.id:
        wanted = {hash(id): id for id in args.id}
        chosen = np.flatnonzero(np.isin(sides[0].table["id"][at[0]], list(wanted)))
        if missing := wanted.keys() - set(sides[0].table["id"][at[0][chosen]].tolist()):
            outputs = "two outputs" if len(sides) == 2 else "outputs"
            raise ConfigError(f"the {outputs} have no common row with the id {wanted[missing.pop()]!r}")
    rows = list(zip(*(side.fetch(place[chosen]) for side, place in zip(sides, at, strict=True)), strict=True))
    if args.json:
        letters = "ab" if len(sides) == 2 else ascii_uppercase[: len(sides)]
        summary["shown"] = [
            {letter: {name: row.get(name) for name in COLUMNS} for letter, row in zip(letters, same, strict=True)}
            for same in rows
        ]
        print_json(summary)
        return 0
    left = 0 if args.id else len(differ) - len(rows)
    (show_two if len(sides) == 2 else show_many)(summary, outs, rows, left, console)
    return 0


def _read(outs: Sequence[Output], wanted: Sequence[str] | None) -> tuple[list[Side], list[str]]:
    """The outputs with their tables, and the names of the compared columns."""
    labels: dict[str, dict[int, str]] = {}
    sides = [Side(out, labels) for out in outs]
    columns = chosen_columns([side.values for side in sides], wanted)
    for side in sides:
        side.read(columns)
    return sides, columns


def _settings(outs: Sequence[Output]) -> dict[str, list[Any]]:
    """The configuration keys that can change an answer and differ between the outputs."""
    found = [dict(_leaves("", out.config)) for out in outs]
    names = dict.fromkeys(itertools.chain.from_iterable(found))
    values = {name: [one.get(name) for one in found] for name in names}
    sections = ("engine", "generation", "dataset")
    return {
        name: given
        for name, given in values.items()
        if name.partition(".")[0] in sections and any(one != given[0] for one in given)
    }


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(f"{path}.{name}".lstrip("."), item)
    elif value is not None:
        yield path, value


def matched(sides: Sequence[Side]) -> tuple[str, list[Positions]]:
    """Matches the rows by id or by place. Returns the way of matching, and the positions of the matched rows in each table.

    The rows are in the order of the first table.
    """
    by, name = "id", "id"
    unique = all(len(np.unique(side.table["id"])) == len(side.table) for side in sides)
    every = "both" if len(sides) == 2 else "all"
    if not unique or not len(functools.reduce(np.intersect1d, (side.table["id"] for side in sides))):
        why = f"no id is in {every}" if unique else "ids repeat"
        if not all(side.rows.complete for side in sides):
            raise ConfigError(f"rows cannot be matched: {why}, and they have no places until {every} runs are complete")
        by, name = f"place in the input, because {why}", "index"
    keys = functools.reduce(np.intersect1d, (side.table[name] for side in sides))
    found = []
    for side in sides:
        order = np.argsort(side.table[name])
        found.append(order[np.searchsorted(side.table[name], keys, sorter=order)])
    order = np.argsort(found[0])
    return by, [positions[order] for positions in found]


def compare(sides: Sequence[Side], at: Sequence[Positions]) -> tuple[dict[str, Any], Positions]:
    """The figures of the comparison of two outputs, and the indices of the pairs that differ."""
    (a, b), (at_a, at_b) = sides, at
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


def compare_many(sides: Sequence[Side], at: Sequence[Positions]) -> tuple[dict[str, Any], Positions]:
    """The figures of the comparison of several outputs, and the indices of the rows that differ."""
    failed = np.array([side.table["failed"][place] for side, place in zip(sides, at, strict=True)])
    answers = np.array([side.table["answer"][place] for side, place in zip(sides, at, strict=True)])
    answered = np.asarray(~failed.any(axis=0))
    equal = answered & (answers == answers[0]).all(axis=0)
    pairs = []
    for a, b in itertools.combinations(range(len(sides)), 2):
        both = ~failed[a] & ~failed[b]
        same = int((both & (answers[a] == answers[b])).sum())
        pairs.append({"outputs": [a, b], "answered": int(both.sum()), "equal": same})
    counts = {
        "in_all": len(at[0]), "answered_in_all": answered.sum(), "equal": equal.sum(), "differ": (answered & ~equal).sum(),
        "failed_in_some": (failed.any(axis=0) & ~failed.all(axis=0)).sum(), "failed_in_all": failed.all(axis=0).sum(),
    }  # fmt: skip
    outputs = [
        {"rows": len(side.table), "only_here": len(side.table) - len(place), "failed": int(lost.sum())}
        | side.summary(place, answered)
        for side, place, lost in zip(sides, at, failed, strict=True)
    ]
    summary = {"rows": {k: int(v) for k, v in counts.items()}, "outputs": outputs, "pairs": pairs}
    return summary, np.flatnonzero((answered & ~equal) | (failed.any(axis=0) & ~failed.all(axis=0)))


def _columns(sides: Sequence[Side], names: Sequence[str], at: Sequence[Positions]) -> dict[str, Any]:
    """The comparison of each column, over the rows that all outputs answered."""
    failed = np.array([side.table["failed"][place] for side, place in zip(sides, at, strict=True)])
    places = [place[~failed.any(axis=0)] for place in at]
    found = {}
    for at_column, name in enumerate(names):
        numbers = [side.table[f"number{at_column}"][place] for side, place in zip(sides, places, strict=True)]
        codes = [side.table[f"code{at_column}"][place] for side, place in zip(sides, places, strict=True)]
        found[name] = compare_column(sides[0].values.labels.get(name, {}), numbers, codes)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
