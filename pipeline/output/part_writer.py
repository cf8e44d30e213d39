"""Writes the part files of one job."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import OutputConfig
from pipeline.dataset.reader import RowReader
from pipeline.output.answers import FoundAnswers, find_answers
from pipeline.output.input_rows import InputReader, InputRows
from pipeline.output.json_lines import data_lines, error_lines
from pipeline.output.jsonl_styles import STYLES
from pipeline.output.plan import Job, OutputColumns, part_name
from pipeline.output.tables import data_table, error_table
from pipeline.report.conversation import shown_row
from pipeline.report.stats import Stats
from pipeline.storage.filesystem import resolve, write_atomic
from pipeline.storage.ledger_index import KeyLookup
from pipeline.storage.output_files import DATA, ERRORS


@dataclass(slots=True)
class JobResult:
    """The result of one job."""

    rows: int = 0
    failed: int = 0
    missing: int = 0  # rows that the ledger has no record of: the run is not over
    errors: Counter[str] = field(default_factory=Counter)  # failed rows by type
    used: list[npt.NDArray[np.uint32]] = field(default_factory=list)  # positions of the rows' requests in the index
    files: dict[str, int] = field(default_factory=dict)  # path below the output -> rows
    stats: Stats = field(default_factory=Stats)


class PartWriter:
    """Reads rows of the input, looks up their answers, writes both. Sent to every task of finalize."""

    def __init__(self, row_reader: RowReader, columns: OutputColumns, output: OutputConfig) -> None:
        self.reader, self.columns, self.output = InputReader(row_reader, columns), columns, output
        self.fs, self.root = resolve(str(output.path))

    def run(self, job: Job, lookup: KeyLookup) -> JobResult:
        """Writes the job's `data/part-N` files and, if rows failed, `errors/part-N`. Stops at the first part with missing
        rows."""
        result = JobResult()
        size = -(-job.rows // job.parts)
        for number, rows in enumerate(self.reader.parts(job.splits, job.rows, size)):
            answers = find_answers(rows, lookup, self.fs)
            if isinstance(answers, int):
                result.missing = answers
                break
            self._write(job.first_part + number, job.index + number * size, rows, answers, result)
        return result

    def _write(self, part: int, first: int, rows: InputRows, answers: FoundAnswers, result: JobResult) -> None:
        failed = int(answers.failed.sum())
        result.rows += len(rows)
        result.failed += failed
        result.errors.update(error["type"] for error in answers.completions["error"].drop_null().to_pylist())
        result.used.append(answers.positions[answers.positions >= 0].astype(np.uint32))
        own = pa.concat_tables(rows.own) if rows.own else self.columns.own_schema.empty_table()
        lines, form = self.output.format == "jsonl", self.output.format
        data = data_table(rows, own, answers, first, self.columns)
        style = STYLES[self.output.style]
        content = data_lines(data, rows.values, self.columns, style) if lines else _parquet(data)
        self._save(part_name(DATA, part, form), content, len(data), result)
        if failed:
            errors = error_table(rows, own, answers, self.columns)
            content = error_lines(errors, self.columns) if lines else _parquet(errors)
            self._save(part_name(ERRORS, part, form), content, len(errors), result)
        _add_stats(first, rows, answers, result.stats)

    def _save(self, path: str, content: bytes, rows: int, result: JobResult) -> None:
        write_atomic(self.fs, f"{self.root}/{path}", content)
        result.files[path] = rows


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _add_stats(first: int, rows: InputRows, answers: FoundAnswers, stats: Stats) -> None:
    """Adds to what the report shows."""
    completions = answers.completions

    def show(row: int) -> dict[str, Any]:
        completion = completions.slice(row, 1).to_pylist()[0]
        own = (rows.ids[row], first + row, rows.messages[row], rows.raw[row], rows.values[row])
        return shown_row(*own, completion)

    stats.add(answers.positions, first, completions, answers.done_at, rows.ids, show)
