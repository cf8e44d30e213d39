"""The result of a run, for a program and for a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from engines.text import visible
from pipeline.dataset.arrow_rows import readable_rows
from pipeline.output.summary import cost_words, counts, first_rows
from pipeline.storage.filesystem import child, resolve
from pipeline.storage.output_files import DATA, ERRORS, REPORT
from pipeline.storage.retry import patiently

# Rows of a part that are in memory at once while `rows` reads it.
BATCH_ROWS = 256


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """The output of a run in which every row has a result. `manifest` is the content of manifest.json; a dry run has none.

    Failed rows are no exception: `failed` counts them, and `errors()` has them.
    """

    path: str  # of the output directory
    manifest: dict[str, Any]

    @property
    def done(self) -> int:
        """The number of rows with an answer."""
        return int(self.manifest["rows"]["done"]) if self.manifest else 0

    @property
    def failed(self) -> int:
        """The number of rows without an answer."""
        return int(self.manifest["rows"]["failed"]) if self.manifest else 0

    @property
    def cost_usd(self) -> float | None:
        """The cost of all runs into this output in US$. None if a part of it is unknown."""
        return self.manifest["cost_usd"] if self.manifest else None

    @property
    def report(self) -> str:
        """The path of report.html."""
        return child(self.path, REPORT)

    def table(self) -> pa.Table:
        """All rows, in input order. The columns are those of the output; `messages` is JSON text."""
        return self._table(DATA)

    def errors(self) -> pa.Table:
        """The failed rows with the input's own columns and the column `error`. It can be the dataset of another run."""
        return self._table(ERRORS)

    def to_pandas(self) -> Any:
        """All rows as a DataFrame of pandas."""
        return self.table().to_pandas()

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows as dicts, in input order. A few of them are in memory at once."""
        for path in self._parts(DATA):
            fs, place = resolve(path)
            with fs.open_input_file(place) as file:
                if place.endswith(".jsonl"):
                    yield from map(orjson.loads, _lines(file))
                else:
                    for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(BATCH_ROWS):
                        yield from readable_rows(batch)

    def _parts(self, folder: str) -> list[str]:
        names = self.manifest["files"] if self.manifest else ()
        return [child(self.path, name) for name in sorted(names) if name.startswith(f"{folder}/")]

    def _table(self, folder: str) -> pa.Table:
        tables = [patiently(lambda path=path: _read(path)) for path in self._parts(folder)]  # type: ignore[misc]
        return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})

    # -- for people ---------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        if not self.manifest:
            return f"<Result: dry run, nothing is written to {self.path}>"
        return f"<Result: {'; '.join(self._figures())}; {self.report}>"

    def _figures(self) -> Iterator[str]:
        yield counts(self.manifest)
        if cost := cost_words(self.manifest):
            yield cost

    def _repr_html_(self) -> str:
        """For notebooks. Answers are texts of a model, which are not trusted: all texts are escaped."""
        if not self.manifest:
            return f"<p>{_escaped(repr(self).strip('<>'))}</p>"
        head = "".join(f"<th style='text-align:left'>{title}</th>" for title in ("id", "last message", "answer"))
        cells = (
            "".join(f"<td style='text-align:left'>{_escaped(cell)}</td>" for cell in row) for row in self._first_rows()
        )
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if body else ""
        return f"<p>{_escaped('; '.join(self._figures()))}.</p>{table}<p>Report: <code>{_escaped(self.report)}</code></p>"

    def _first_rows(self) -> list[tuple[str, ...]]:
        try:
            return first_rows(self.manifest, self.path)
        except OSError:  # the output was moved or removed since
            return []


def _read(path: str) -> pa.Table:
    fs, place = resolve(path)
    with fs.open_input_file(place) as file:
        if not place.endswith(".jsonl"):
            return pq.ParquetFile(file).read()
        return pa.Table.from_pylist([orjson.loads(line) for line in _lines(file)])


def _lines(file: pa.NativeFile) -> Iterator[bytes]:
    """The lines of a file, whose pieces are read one after the other."""
    rest = b""
    while piece := file.read(1 << 20):
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _escaped(text: str) -> str:
    return html.escape(visible(text))
