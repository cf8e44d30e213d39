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
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from engines.errors import docs_link
from engines.text import counted, one_line, visible
from pipeline.monitor.status import ReplicaProblem
from pipeline.report import charts
from pipeline.report.advice import ADVICE, TRUNCATED
from pipeline.report.costs import cost_of, dollars
from pipeline.report.rows import ShownRows, select_rows
from pipeline.report.stats import Example, Stats
from pipeline.report.value_chart import Column, Embeddings
from pipeline.report.value_stats import ValueStats
from pipeline.storage.filesystem import write_atomic
from pipeline.storage.output_files import REPORT

FILES_SHOWN, BATCHES_SHOWN, PROMPTS = 10, 20, 3


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
    shown = select_rows(stats)
    config = _given(orjson.loads(orjson.dumps(manifest["config"])))
    names = [file["path"].rsplit("/", 1)[-1] for file in manifest["input"]["files"]]
    context = {
        "policy": f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        "style": Markup(style),
        "script": Markup(script),
        "m": manifest,
        "model": _models(manifest, shown),
        "stats": stats,
        "columns": [Column.of(name, found) for name, found in stats.columns.items() if _is_scored(name, found)],
        "response": Column.of("response", stats.columns["response"]) if "response" in stats.columns else None,
        "embeddings": Embeddings.of(stats.vectors) if stats.vectors.norms.rows else None,
        "truncated": stats.finish.examples.get("length", []),
        "prompt": _prompt(config, shown),
        "series": series,
        "sums": sums,
        "charts": charts,
        "names": names,
        "bytes": sum(file["bytes"] or 0 for file in manifest["input"]["files"]),
        "shared": stats.answers - manifest["rows"]["requests"],
        "errors": sorted(manifest["errors"].items(), key=lambda item: -item[1]),
        "failures": lambda type: _by_message(stats.examples.get(type, [])),
        "advice": ADVICE,
        "problems": [ReplicaProblem(**problem).sentence() for problem in manifest.get("replica_problems", ())],
        "truncated_advice": TRUNCATED,
        "docs": docs_link,
        "cost": cost_of(manifest),
        "shown": shown,
        "generation": config.get("generation", {}),
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "files_shown": FILES_SHOWN,
        "batches_shown": BATCHES_SHOWN,
    }
    return str(_template("report.html").render(context))


def _is_scored(name: str, found: ValueStats) -> bool:
    """True for a column of `output.columns` or of a task; false for the text of the answers."""
    return found.kind != "other" and name != "response"


def _by_message(examples: list[Example]) -> list[tuple[str, list[Example]]]:
    """The examples of failed rows by their message, without the row's id in it."""
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example.message.removeprefix(f"{example.id}: ")[:400], []).append(example)
    return list(found.items())


def _models(manifest: Mapping[str, Any], shown: ShownRows) -> str:
    """The model of the run, or the model that answered."""
    found = manifest["engine"]["model"] or next((row["model"] for row in shown.rows.values() if row["model"]), None)
    return str(found or manifest["engine"]["kind"])


def _prompt(config: Mapping[str, Any], shown: ShownRows) -> list[tuple[str, str, str]]:
    """(title, text, note) of what the prompts have in common."""
    template = config.get("dataset", {}).get("template")
    if isinstance(template, Mapping):
        return [(f"Template: {name}", str(text), "") for name, text in template.items()]
    found = [("System message", shown.system, "the same in all rows with one")] if shown.system else []
    if template is not None:
        return [*found, ("Template", str(template), "")]
    for group in shown.prompts[:PROMPTS]:
        rows = f"{len(group.at):,} of {counted(len(shown.rows), 'row')} on this page begin alike"
        found.append(("Shared prompt", f"{group.before.strip()} … {group.after.strip()}".strip(), rows))
    return found


def _template(name: str) -> Any:
    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        counted=counted,
        number=charts.number,
        seconds=charts.seconds,
        visible=visible,
        dollars=dollars,
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
