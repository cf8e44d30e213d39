"""The result of `eagleray tune` as a table, as JSON, and as comments of a run file."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from engines.config import EngineConfig
from engines.identity import shapes_answers
from engines.registry import kind_of
from engines.text import counted
from engines.tuning import KWARGS, Option
from pipeline.tuning.search import Found
from pipeline.tuning.trials import Measured

MARK = "*"  # of settings that may change answers
COLUMNS = ("settings", "rows/s", "tokens/s", "", "load", "")


def changing_keys(engine: EngineConfig, option: Option) -> list[str]:
    """The keys of an option that may change answers: those that are part of the keys of requests."""
    kind = kind_of(engine)
    return [name for name in option if name.startswith(KWARGS) and shapes_answers(kind, name.removeprefix(KWARGS))]


def shown(engine: EngineConfig, option: Option) -> str:
    """The keys of an option as a user types them, without `engine.kwargs`; keys that may change answers have a mark."""
    if not option:
        return "the configuration"
    marked = set(changing_keys(engine, option))
    return " ".join(
        f"{name.removeprefix(KWARGS).removeprefix('engine.')}={_word(value)}{MARK if name in marked else ''}"
        for name, value in option.items()
    )


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def words(option: Option) -> list[str]:
    """The keys of an option as arguments of a command."""
    return [f"{name}={_word(value)}" for name, value in option.items()]


def rows(engine: EngineConfig, found: Found) -> list[tuple[str, ...]]:
    """A row for each measurement, in the order of `COLUMNS`."""
    first = next((each.rate for each in found.measured if each.role == "baseline"), 0.0)
    return [_row(engine, measured, first) for measured in found.measured]


def _row(engine: EngineConfig, measured: Measured, first: float) -> tuple[str, ...]:
    name, load = shown(engine, measured.changes), f"{measured.load_s:.0f} s" if measured.load_s else ""
    if measured.error:
        return name, "", "", "", load, measured.error
    rate, tokens = measured.rows / measured.seconds, (measured.input + measured.output) / measured.seconds
    notes = [counted(measured.failed, "row fails", "rows fail")] if measured.failed else []
    notes += ["stopped: slower"] if measured.is_cut else []
    notes += ["again"] if measured.role == "confirm" else []
    times = f"{measured.rate / first:.2f}" if first else ""  # no row was done in time
    return name, f"{rate:,.3g}", f"{tokens:,.0f}", times, load, ", ".join(notes)


def table(engine: EngineConfig, found: Found) -> Table:
    """The measurements. Those of the settings that win are bold."""
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for at, title in enumerate(COLUMNS):
        result.add_column(title, justify="right" if 0 < at < 5 else "left", overflow="fold")
    for measured, row in zip(found.measured, rows(engine, found), strict=True):
        style = "red" if measured.error else "bold green" if found.changes and measured.changes == found.changes else ""
        result.add_row(*(Text(cell, style) for cell in row))  # as `Text`: an error may look like markup
    return result


def sentence(engine: EngineConfig, found: Found) -> str:
    """The result in words."""
    if found.changes:
        return f"{shown(engine, found.changes)}: {found.gain:+.0%}, with a noise of {found.noise:.0%}"
    if found.tried:
        ours = f"{shown(engine, found.tried)} was faster once, but measured again in turns it is not ({found.gain:+.0%}, "
        return f"nothing is faster: {ours}with a noise of {found.noise:.0%})"
    if not any(each.role == "try" for each in found.measured):
        return "no setting was tried"
    return f"nothing is faster than the configuration (noise: {found.noise:.0%})"


def ending(found: Found, most: int) -> str:
    """The reason why not all settings were tried, and what all of the `most` measurements need. Empty if all were tried."""
    if not found.ended_by:
        return ""
    text = f"Not all settings were tried, because {found.ended_by} is used up"
    if found.ended_by == "run.budget_usd":
        return f"{text}."
    minutes = math.ceil(most * found.longest / 60)
    return f"{text}: a measurement takes about {found.longest:.0f} s, so all of them need up to tune.minutes={minutes}."


def comment(engine: EngineConfig, found: Found, sample: int) -> list[str]:
    """The result as lines of a comment in a run file."""
    head = f"Tuned by eagleray tune on {datetime.date.today()}, with {counted(sample, 'row')}: {sentence(engine, found)}."
    cells = [COLUMNS, *rows(engine, found)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(COLUMNS) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1][:80]]).rstrip()
        for row in cells
    ]
    marks = [f"{MARK} may change answers"] if any(MARK in line for line in lines) else []
    return [head, *(f"  {line}" for line in [*lines, *marks])]


def as_json(engine: EngineConfig, found: Found, sample: int, written: str | None) -> Mapping[str, Any]:
    """The result for programs."""
    return {
        "engine": engine.kind,
        "model": engine.model,
        "rows": sample,
        "settings": dict(found.changes),
        "gain": round(found.gain, 4),
        "noise": round(found.noise, 4),
        "ended_by": found.ended_by or None,
        "written": written,
        "measured": [
            {
                "settings": dict(each.changes),
                "role": each.role,
                "may_change_answers": bool(changing_keys(engine, each.changes)),
                "rows": each.rows,
                "failed": each.failed,
                "seconds": round(each.seconds, 3),
                "load_s": round(each.load_s, 3),
                "rows_per_s": round(each.rows / each.seconds, 3) if each.seconds else None,
                "tokens_per_s": round((each.input + each.output) / each.seconds, 3) if each.seconds else None,
                "cost_usd": each.cost_usd,
                "error": each.error,
                "cut": each.is_cut,
            }
            for each in found.measured
        ],
    }
