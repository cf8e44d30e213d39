"""Writes report.html: an overview of the run in one file that loads nothing.

Text from models and datasets is shown as text only. Jinja escapes it. Conversations are embedded as JSON that cannot close
its script element, and the script inserts them as text nodes. The page's content security policy allows no other script
or style.
"""

from __future__ import annotations

import base64
import hashlib
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import orjson
import pyarrow.compute as pc
import pyarrow.fs as pafs
import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from engines.text import one_line, visible
from pipeline.report import charts
from pipeline.report.stats import Stats
from pipeline.storage.filesystem import write_atomic
from pipeline.storage.output_files import REPORT

# Limit of the embedded conversations in bytes.
SAMPLE_BYTES = 1_200_000
FILES_SHOWN, BATCHES_SHOWN = 10, 20


def write_report(fs: pafs.FileSystem, root: str, manifest: Mapping[str, Any], stats: Stats, console: Console) -> None:
    """Writes the report. A failure does not stop the run: it is printed, and the file shows the traceback instead."""
    failure = stats.broken
    if failure is None:
        try:
            page = render(manifest, stats)
        except Exception:  # a bug of ours
            failure = traceback.format_exc()
    if failure is not None:
        page = str(_template("report_broken.html").render(traceback=visible(failure)))
        last = visible(failure.strip().splitlines()[-1])[:300]
        text = f"A bug in Eagleray prevented the report ({last}). The output is complete. {REPORT} has the traceback."
        console.print(Text(text, "yellow"))
    try:
        write_atomic(fs, f"{root}/{REPORT}", page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        console.print(Text(f"{REPORT} could not be written: {one_line(error)}", "yellow"))


def render(manifest: Mapping[str, Any], stats: Stats) -> str:
    """The page as HTML."""
    style, script = _asset("report.css"), _asset("report.js")
    series = charts.series_of(stats.timeline) if stats.timeline.seconds else None
    sums = {name: pc.sum(stats.timeline.cells[name]).as_py() for name in ("answered", "failed", "output")}
    rows = {shown.at: shown.row for shown in (*stats.slowest, *stats.failed, *stats.sample)}
    sample, size = {}, 0
    for index, row in rows.items():
        size += len(htmlsafe_json_dumps(row).encode())
        if size <= SAMPLE_BYTES:
            sample[index] = row
    config = _given(orjson.loads(orjson.dumps(manifest["config"])))
    model = manifest["engine"]["model"] or next((row["model"] for row in rows.values() if row["model"]), None)
    context = {
        "policy": f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        "style": Markup(style),
        "script": Markup(script),
        "m": manifest,
        "model": model,
        "stats": stats,
        "series": series,
        "sums": sums,
        "charts": charts,
        "names": [file["path"].rsplit("/", 1)[-1] for file in manifest["input"]["files"]],
        "bytes": sum(file["bytes"] or 0 for file in manifest["input"]["files"]),
        "duplicates": manifest["rows"]["total"] - manifest["rows"]["invalid"] - manifest["rows"]["requests"],
        "shared": stats.answers - manifest["rows"]["requests"],
        "errors": sorted(manifest["errors"].items(), key=lambda item: -item[1]),
        "slowest": [(shown.at, shown.row, shown.at in sample) for shown in stats.slowest],
        "sample": [sample[index] for index in sorted(sample)],
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "files_shown": FILES_SHOWN,
        "batches_shown": BATCHES_SHOWN,
    }
    return str(_template("report.html").render(context))


def _template(name: str) -> Any:
    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=charts.number,
        seconds=charts.seconds,
        visible=visible,
        dollars=_dollars,
        date=lambda at: datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return environment.get_template(name)


def _asset(name: str) -> str:
    return (files("pipeline.report") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _given(value: Any) -> Any:
    """The value without keys that are None or empty."""
    if not isinstance(value, dict):
        return value
    found = {name: _given(item) for name, item in value.items()}
    return {name: item for name, item in found.items() if item not in (None, {}, [])}


def _dollars(value: float | None) -> str:
    if value is None:  # an unknown price
        return "–"
    if value >= 1 or round(value, 2) == value:
        return f"${value:,.2f}"
    return f"${value:.4g}" if value >= 1e-4 else f"${value:.1e}"
