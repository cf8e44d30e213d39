"""The result of a run in a few lines of text, for terminals and notebooks: counts, cost, the first answers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engines.text import counted
from pipeline.dataset.arrow_rows import readable_rows
from pipeline.dataset.task_inputs import INPUT_ROLES
from pipeline.monitor.progress import sent_line
from pipeline.monitor.status import RowCounts, row_cells
from pipeline.report.task_values import values_of, values_text
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger import VALUE_COLUMNS
from pipeline.storage.retry import patiently

SHOWN = 5


def lines(manifest: dict[str, Any]) -> Iterator[str]:
    """The figures: the rows of the output, the requests of this run, and the sums over all runs."""
    yield f"{counts(manifest)}."
    tokens, cost = manifest["tokens"], cost_words(manifest)
    yield (
        f"{sent_line(manifest['this_run']['requests_sent'])} All runs: {manifest['requests_sent']:,} sent, "
        f"{tokens['input']:,} tokens in, {tokens['output']:,} out{f'; {cost}' if cost else ''}."
    )


def counts(manifest: dict[str, Any]) -> str:
    """The rows of the output by result, and the failed ones by their error type."""
    cells = row_cells(row_counts(manifest["rows"]))
    if manifest["errors"]:
        cells[1] += f" ({_errors(manifest['errors'])})"
    return ", ".join(cells)


def row_counts(rows: Mapping[str, int]) -> RowCounts:
    """The rows of a manifest. Older versions did not count truncated answers."""
    return RowCounts(rows["total"], rows["done"], rows["failed"], 0, rows.get("truncated", 0), rows.get("invalid", 0))


def cost_words(manifest: dict[str, Any]) -> str:
    """The cost of the output, of all runs. Empty for engines on this machine, which cost nothing."""
    cost, as_of = manifest["cost_usd"], manifest.get("price_as_of")  # an older output has no date
    if cost is None:
        known, unknown = manifest.get("cost_known_usd"), manifest.get("cost_unknown_requests", 0)
        if known:
            return f"${known:,.4f} and the unknown cost of {counted(unknown, 'request')}"
        return "the cost is unknown"
    of = f" by the list price of {as_of}" if as_of else ""
    return f"${cost:,.4f}{of}" if cost else ""


def _errors(errors: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(errors.items()))


def first_rows(manifest: dict[str, Any], path: str) -> list[tuple[str, ...]]:
    """The id, the last message and the answer of the first rows. Empty for the styles of other tools."""
    name = next((name for name in manifest["files"] if name.startswith("data/")), None)
    if name is None or manifest["config"]["output"]["style"] != "eagleray":
        return []
    fs, root = resolve(path)
    inputs = _inputs(manifest["config"]["dataset"].get("columns") or {})
    rows = patiently(lambda: _head(fs, f"{root}/{name}", inputs))
    return [tuple(map(one_line, (row["id"], _asked(row, inputs), _answer(row)))) for row in rows]


def _inputs(columns: Mapping[str, Any]) -> list[str]:
    """The columns that may hold the input of a task other than a chat. `columns`: `dataset.columns`."""
    return [*(str(columns[role]) for role in INPUT_ROLES if columns.get(role)), *INPUT_ROLES, "input"]


def _head(fs: pafs.FileSystem, path: str, inputs: Collection[str]) -> list[dict[str, Any]]:
    """The first rows of an output part."""
    with fs.open_input_file(path) as file:
        if path.endswith(".parquet"):
            parquet = pq.ParquetFile(file)
            more = [name for name in parquet.schema_arrow.names if name in inputs or name in VALUE_COLUMNS]
            columns = ["id", "messages", "response", "error.message", *more]
            batch = next(parquet.iter_batches(batch_size=SHOWN, columns=columns), None)
            return readable_rows(batch) if batch is not None else []
        # 1 MiB holds several lines, except for very long ones: only complete lines are shown.
        head = file.read(1 << 20).split(b"\n")
        return [json.loads(line) for line in head[:-1][:SHOWN]]


def _asked(row: Mapping[str, Any], inputs: Collection[str]) -> str:
    """The last message of the user, or the input of another task."""
    messages = row["messages"]
    found = json.loads(messages) if isinstance(messages, str) else messages or []
    asked = [m["content"] for m in found if m["role"] == "user"] or [row[name] for name in inputs if row.get(name)]
    return str(asked[-1] if found else asked[0]) if asked else ""


def _answer(row: dict[str, Any]) -> str:
    if row["error"]:
        return f"({row['error']['message']})"
    return row["response"] or values_text(values_of(row))


def one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]
