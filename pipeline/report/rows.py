"""Selects the rows that the page shows, and marks in them what other rows have, too."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jinja2.utils import htmlsafe_json_dumps

from pipeline.report.conversation import LEFT_OUT, Turn
from pipeline.report.shared_texts import Alike, alike
from pipeline.report.stats import Stats
from pipeline.report.value_stats import Shown

# Limit of the embedded conversations in bytes.
SAMPLE_BYTES = 1_200_000
# The characters of a text in a list, and the number of answers that the page lists.
BRIEF_CHARS, ANSWERS = 160, 12
# A shorter part of a text is shown with this many characters before it.
WORDS_CHARS = 24
_SPACE = re.compile(r"\s+")

Row = dict[str, Any]


@dataclass(slots=True)
class ShownRows:
    """The rows of the page, by their index, and what their prompts share."""

    rows: dict[int, Row]  # embedded in the page
    system: str  # the system message of all rows that have one; empty if they differ
    prompts: list[Alike]  # groups of prompts that begin alike, the largest first
    answers: list[tuple[str, list[Row]]]  # for chats: the shared beginning, and the rows


def select_rows(stats: Stats) -> ShownRows:
    """The rows to embed, up to `SAMPLE_BYTES`. Adds `brief` to each row: the part of its prompt that other rows do not
    have; and the lengths of the shared parts to their turns."""
    rows: dict[int, Row] = {}
    size = 0
    for shown in _wanted(stats):
        if shown.at not in rows:
            size += len(htmlsafe_json_dumps(shown.row).encode())
            if size <= SAMPLE_BYTES:
                rows[shown.at] = shown.row
    rows = dict(sorted(rows.items()))
    prompts = _mark_prompts(list(rows.values()))
    system = _mark_system(rows.values())
    return ShownRows(rows, system, prompts, _answers(stats, rows))


def _wanted(stats: Stats) -> Iterable[Shown]:
    yield from (*stats.slowest, *stats.failed, *stats.sample)
    for values in (stats.finish, stats.vectors.norms, *stats.columns.values()):
        for shown in values.examples.values():
            yield from shown
    for pair in (pair for pairs in stats.vectors.pairs()[1:] for pair in pairs):
        yield from (pair.one, pair.two)


def _mark_prompts(rows: list[Row]) -> list[Alike]:
    said = [_prompt(row) for row in rows]
    texts = [LEFT_OUT.sub(" ⋯ ", _text(turn)) if turn else "" for turn in said]
    groups = alike(texts)
    for group in groups:
        for at in group.at:
            row, turn = rows[at], said[at]
            row["brief"] = _differing(group, texts[at], BRIEF_CHARS)
            parts = [part for part in turn["parts"] if part["kind"] in ("text", "code")] if turn else []
            if group.before and len(parts) == 1:
                parts[0]["shared"] = _shared(parts[0]["text"], group)
    found = [group for group in groups if group.before]
    return sorted(found, key=lambda group: -len(group.at))


def _differing(group: Alike, text: str, limit: int) -> str:
    """The part of a text that the others of its group do not share. If it is short, with the words before it."""
    differs = brief(group.differing(text), limit)
    if group.before and len(differs) < WORDS_CHARS:
        before = brief(group.before, len(group.before))[-WORDS_CHARS:].partition(" ")[2]
        differs = f"… {before} {differs}"
    return differs


def _shared(text: str, group: Alike) -> list[int]:
    """The lengths of the shared beginning and ending of a text, in the UTF-16 units of JavaScript."""
    cut = LEFT_OUT.search(text)
    before = group.before if cut is None else text[: min(len(group.before), cut.start())]
    after = group.after if cut is None else text[max(cut.end(), len(text) - len(group.after)) :]
    return [len(part.encode("utf-16-le", "surrogatepass")) // 2 for part in (before, after)]


def _prompt(row: Row) -> Turn | None:
    """The turn that the answer answers."""
    turns = [turn for turn in row["turns"] if turn["role"] in ("user", "input") and not turn.get("answer")]
    return turns[-1] if turns else None


def _mark_system(rows: Iterable[Row]) -> str:
    """Marks system messages that several rows have. Returns the message if all rows with one have the same."""
    turns = [turn for row in rows for turn in row["turns"] if turn["role"] == "system"]
    counts = Counter(map(_text, turns))
    for turn in turns:
        if counts[_text(turn)] > 1:
            turn["rows"] = counts[_text(turn)]
    return next(iter(counts)) if len(counts) == 1 else ""


def _answers(stats: Stats, rows: dict[int, Row]) -> list[tuple[str, list[Row]]]:
    """Some answers, grouped by the beginnings that they share. Adds `said` to each row: what its answer does not share."""
    chosen = [rows[shown.at] for shown in stats.sample if shown.at in rows and not shown.row["error"]][:ANSWERS]
    texts = [_answer(row) for row in chosen]
    found = []
    for group in alike(texts):
        for at in group.at:
            chosen[at]["said"] = _differing(group, texts[at], 2 * BRIEF_CHARS)
        found.append((brief(group.before, 2 * BRIEF_CHARS), [chosen[at] for at in group.at]))
    return sorted(found, key=lambda item: (-len(item[1]), item[1][0]["index"]))


def _answer(row: Row) -> str:
    turn = next((turn for turn in row["turns"] if turn.get("answer")), None)
    return _text(turn) if turn else ""


def _text(turn: Turn) -> str:
    return "\n".join(part["name"] + " " + part["text"] if part["kind"] == "call" else part["text"]
                     for part in turn["parts"] if part["kind"] != "reasoning")  # fmt: skip


def brief(text: str, limit: int = BRIEF_CHARS) -> str:
    """The text in one line of at most `limit` characters."""
    line = _SPACE.sub(" ", LEFT_OUT.sub(" ⋯ ", text)).strip()
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"
