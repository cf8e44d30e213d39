"""Prints the comparison of outputs that `diff.py` makes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from string import ascii_uppercase as LETTERS
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.text import counted, visible
from engines.types import called
from jobs.reading import Output, StoredRow, brief, say
from jobs.show import figures
from pipeline.dataset.task_inputs import INPUT_ROLES
from pipeline.report.task_values import values_of, values_text

# Longer texts are cut: the time of a comparison by words grows with the square of their length.
WORDS = 1_500
# A confusion table with more labels than this is not printed.
MOST_LABELS = 12
TableLine = tuple[str, ...]


def show_two(
    summary: dict[str, Any], outs: Sequence[Output], pairs: Sequence[Sequence[StoredRow]], left: int, console: Console
) -> None:
    """Prints the comparison of two outputs, and pairs of rows side by side. `left` more pairs differ and are not shown."""
    rows, a, b = summary["rows"], summary["a"], summary["b"]
    _show_head(summary, outs, console)
    note = "" if summary["matched_by"] == "id" else f", matched by {summary['matched_by']}"
    say(console, f"\n{counted(rows['both'], 'row')} in both{note}", "bold")
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
    title = f"of {counted(rows['equal'] + rows['differ'], 'row')} answered in both"
    console.print(_grid(title, ("A", "B", "B - A"), lines, "right"))
    _show_columns(summary["columns"], console)
    for one, two in pairs:
        _show_pair(one, two, console)
    _say_left(left, console)


def show_many(
    summary: dict[str, Any], outs: Sequence[Output], rows: Sequence[Sequence[StoredRow]], left: int, console: Console
) -> None:
    """The same for more than two outputs. The answers to a row are grouped by the outputs that gave them."""
    counts, outputs, names = summary["rows"], summary["outputs"], LETTERS[: len(outs)]
    _show_head(summary, outs, console)
    note = "" if summary["matched_by"] == "id" else f", matched by {summary['matched_by']}"
    say(console, f"\n{counted(counts['in_all'], 'row')} in all{note}", "bold")
    for name in ("equal", "differ", "failed_in_some", "failed_in_all"):
        if counts[name] or name in ("equal", "differ"):
            say(console, f"  {name.replace('_', ' '):<18}{counts[name]:>9,}")
    lines = [(name.replace("_", " "), *(f"{out[name]:,}" for out in outputs)) for name in ("rows", "only_here", "failed")]
    console.print(_grid("of all rows", names, lines, "right"))
    lines = [(name.replace("_", " "), *(f"{out[name]:,}" for out in outputs)) for name in ("input_tokens", "output_tokens")]
    for name in ("median", "p95"):
        seconds = [out["latency_s"].get(name) for out in outputs]
        if any(seconds):
            lines.append((f"latency, {name}", *("-" if s is None else f"{s:,.2f} s" for s in seconds)))
    costs = [out["cost_usd"] for out in outputs]
    if any(costs):
        lines.append(("cost of all rows", *("-" if cost is None else f"{cost:,.4f} $" for cost in costs)))
    for name in sorted({name for out in outputs for name in out["finish_reasons"]}):
        lines.append((f"finish {brief(name, 30)}", *(f"{out['finish_reasons'].get(name, 0):,}" for out in outputs)))
    console.print(_grid(f"of {counted(counts['answered_in_all'], 'row')} answered in all", names, lines, "right"))
    shares = {tuple(p["outputs"]): p["equal"] / p["answered"] if p["answered"] else None for p in summary["pairs"]}
    console.print(_matrix("equal answers", names, shares))
    _show_columns(summary["columns"], console)
    for same in rows:
        _show_row(same, console)
    _say_left(left, console)


def _show_head(summary: dict[str, Any], outs: Sequence[Output], console: Console) -> None:
    for letter, out in zip(LETTERS, outs, strict=False):
        so_far = "" if out.manifest is not None else " (not complete: what is answered so far)"
        lacks = ", output.style=openai_batch: without prompts and times" if out.style == "openai_batch" else ""
        say(console, f"{letter}  {out.path}{so_far}{lacks}", "bold")
    if summary["settings"]:
        lines = [(key, *map(_value, values)) for key, values in summary["settings"].items()]
        console.print(_grid("set differently", LETTERS[: len(outs)], lines))


def _say_left(left: int, console: Console) -> None:
    if left:
        say(console, f"{counted(left, 'more row differs', 'more rows differ')} (--limit).", "dim")


def _grid(title: str, names: Sequence[str], lines: Sequence[TableLine], justify: Any = "left") -> Table:
    table = Table(title, box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in names:
        table.add_column(Text(name), justify=justify, overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def _matrix(title: str, names: Sequence[str], shares: dict[tuple[int, ...], float | None]) -> Table:
    """A share for each pair of outputs."""
    numbers = range(len(names))
    cells = [[_percent(shares.get((a, b), shares.get((b, a)))) if a != b else "" for b in numbers] for a in numbers]
    return _grid(title, names, [(name, *row) for name, row in zip(names, cells, strict=True)], "right")


# -- columns ----------------------------------------------------------------------------------------------------------


def _show_columns(columns: dict[str, Any], console: Console) -> None:
    for name, found in columns.items():
        without = f", {found['without_value']:,} more lack a value" if found["without_value"] else ""
        rows = counted(found["rows"], "row")
        title = f"\n{brief(name, 60)} ({found['kind']}): {_percent(found['agreement'])} agreement of {rows}"
        say(console, f"{title}{without}", "bold")
        if found["kind"] == "number":
            headings = ("agreement", "mean", "mean", "mean difference", "mean |difference|", "correlation")
            console.print(_grid("", headings, [_number_line(pair, found["means"]) for pair in found["pairs"]], "right"))
        elif len(found["pairs"]) > 1:
            letters = LETTERS[: len({at for pair in found["pairs"] for at in pair["outputs"]})]
            console.print(_matrix("agreement", letters, {tuple(p["outputs"]): p["agreement"] for p in found["pairs"]}))
        for pair in found["pairs"]:
            if pair["outputs"][0] == 0 and pair.get("confusion"):  # the other pairs are in --json
                _show_confusion(pair, console)


def _number_line(pair: dict[str, Any], means: Sequence[float | None]) -> TableLine:
    a, b = pair["outputs"]
    numbers = (pair["mean_difference"], pair["mean_absolute_difference"], pair["correlation"])
    shown = ("-" if value is None else f"{value:+.4g}" if not at else f"{value:.4g}" for at, value in enumerate(numbers))
    each = ("-" if (mean := means[at]) is None else f"{LETTERS[at]} {mean:.4g}" for at in (a, b))
    return (f"{LETTERS[b]} - {LETTERS[a]}", _percent(pair["agreement"]), *each, *shown)


def _show_confusion(pair: dict[str, Any], console: Console) -> None:
    labels = sorted({label for cell in pair["confusion"] for label in cell["values"]}, key=_natural)
    if len(labels) > MOST_LABELS:
        return
    counts = {tuple(cell["values"]): cell["rows"] for cell in pair["confusion"]}
    a, b = (LETTERS[at] for at in pair["outputs"])
    lines = [(brief(x, 24), *(f"{counts[x, y]:,}" if (x, y) in counts else "" for y in labels)) for x in labels]
    console.print(_grid(f"{a} \\ {b}", [brief(label, 24) for label in labels], lines, "right"))


def _natural(label: str) -> tuple[float, str]:
    """Sorts numbers by value, before other texts."""
    try:
        return float(label), label
    except ValueError:
        return float("inf"), label


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


# -- rows -------------------------------------------------------------------------------------------------------------


def _show_row(rows: Sequence[StoredRow], console: Console) -> None:
    ids = list(dict.fromkeys(brief(row["id"], 60) for row in rows))
    console.print()
    say(console, " / ".join(ids), "bold")
    if asked := next(filter(None, map(_asked, rows)), ""):
        say(console, brief(asked, 300), "cyan")
    groups: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        groups.setdefault(_answer(row), []).append(at)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for text, members in groups.items():
        table.add_row(Text(" ".join(LETTERS[at] for at in members), "bold"), Text(visible(text)))
        if len(members) == 1:
            table.add_row("", Text(figures(rows[members[0]]), "dim"))
    console.print(table)


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
    if not texts:  # the input of a task other than a chat
        return next((row[name] for name in (*INPUT_ROLES, "input") if isinstance(row.get(name), str)), "")
    return "\n".join(text if isinstance(text, str) else brief(text) for _, text in sorted(texts.items()))


def _answer(row: StoredRow) -> str:
    if row["error"]:
        return f"({row['error']['type']}: {row['error']['message']})"
    calls = ["→ {}({})".format(*called(call)) for call in row.get("tool_calls") or []]
    if row.get("response") is None and not calls:
        return values_text(values_of(row))
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
