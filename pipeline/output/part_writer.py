"""Writes the part files of one job."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from engines.tasks import CHAT, TASKS
from pipeline.config import OutputConfig
from pipeline.dataset.reader import RowReader
from pipeline.garbage import without_collection
from pipeline.output.answers import AnswerPlaces, FoundAnswers
from pipeline.output.input_rows import InputReader, InputRows
from pipeline.output.json_lines import data_lines, error_lines
from pipeline.output.jsonl_styles import STYLES
from pipeline.output.part_file import PartFile
from pipeline.output.plan import Job, OutputColumns, part_name
from pipeline.output.table_append import ID_BYTES, NO_ID
from pipeline.output.tables import data_table, error_table
from pipeline.report.conversation import shown_row
from pipeline.report.stats import Stats
from pipeline.report.task_values import report_columns
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger_index import KeyLookup
from pipeline.storage.output_files import DATA, ERRORS


@dataclass(slots=True)
class JobResult:
    """The result of one job."""

    rows: int = 0
    failed: int = 0
    truncated: int = 0  # answered rows whose finish reason is `length`
    missing: int = 0  # rows without a record in the ledger: another pass is needed
    errors: Counter[str] = field(default_factory=Counter)  # failed rows by type
    # The lane and the model of answers -> the positions of the rows' requests in the index.
    used: dict[tuple[str, str], list[npt.NDArray[np.uint32]]] = field(default_factory=dict)
    # Positions of the rows with numbered keys. Each row needs a position of its own.
    numbered: list[npt.NDArray[np.uint32]] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)  # path below the output -> rows
    stats: Stats = field(default_factory=Stats)
    lengths: set[int] = field(default_factory=set)  # of the embeddings
    keys: dict[str, bytes] = field(default_factory=dict)  # for `output.table`: path of a part -> the ids of its rows


class PartWriter:
    """Reads rows of the input, looks up their answers, and writes both. Every task of finalize gets a copy."""

    def __init__(self, row_reader: RowReader, columns: OutputColumns, output: OutputConfig) -> None:
        self.reader, self.columns, self.output = InputReader(row_reader, columns), columns, output
        self.fs, self.root = resolve(str(output.path))

    @without_collection()
    def run(self, job: Job, lookup: KeyLookup) -> JobResult:
        """Writes the job's `data/part-N` files and, if rows failed, `errors/part-N`. Stops at the first piece with missing
        rows. Holds one piece of the input and one part of the output in memory."""
        result, open_part = JobResult(), _OpenPart(job.first_part, self.output.format)
        for number, piece in self.reader.parts(job.splits, job.part_rows, lookup.old_until_ms):
            places = AnswerPlaces.find(piece, lookup)
            if places.missing:
                result.missing = places.missing
                return result
            if job.first_part + number != open_part.number:
                self._finish(open_part, result)
                open_part = _OpenPart(job.first_part + number, self.output.format)
            for taken in places.slices(lookup.row_bytes):
                rows = piece.slice(taken.start, taken.stop)
                answers = places.read(rows, taken, lookup.paths, self.fs, self.columns.answer_schema)
                self._add(open_part, job.index + result.rows, rows, answers, result)
        self._finish(open_part, result)
        return result

    def _add(self, part: _OpenPart, first: int, rows: InputRows, answers: FoundAnswers, result: JobResult) -> None:
        failed = int(answers.failed.sum())
        result.rows += len(rows)
        result.failed += failed
        result.truncated += answers.truncated
        if "embedding" in self.columns.values:
            lengths = pc.list_value_length(answers.completions["embedding"].drop_null())
            result.lengths.update(pc.unique(lengths).to_pylist())
        result.errors.update(error["type"] for error in answers.completions["error"].drop_null().to_pylist())
        if self.output.table is not None:
            for key, has_failed in zip(rows.keys, answers.failed.tolist(), strict=True):
                part.keys += NO_ID if key is None or has_failed else key[:ID_BYTES]
        for group, positions in answers.by_lane_and_model():
            result.used.setdefault(group, []).append(positions)
        numbered = np.array([item.is_numbered for item in rows.items], np.bool_)
        if numbered.any():
            result.numbered.append(answers.positions[numbered].astype(np.uint32))
        own = pa.concat_tables(rows.own) if rows.own else self.columns.own_schema.empty_table()
        data = data_table(rows, own, answers, first, self.columns)
        errors = error_table(rows, own, answers, self.columns) if failed else None
        if self.output.format == "jsonl":
            style = STYLES[self.output.style]
            part.data.add_lines(data_lines(data, rows.values, self.columns, style, rows.tasks), len(data))
            if errors is not None:
                part.errors.add_lines(error_lines(errors, self.columns), len(errors))
        else:
            part.data.add_table(data)
            if errors is not None:
                part.errors.add_table(errors)
        self._add_stats(first, rows, answers, data, result.stats)

    def _add_stats(self, first: int, rows: InputRows, answers: FoundAnswers, data: pa.Table, stats: Stats) -> None:
        """Adds the rows to the statistics of the report."""
        completions = answers.completions

        def show(row: int) -> dict[str, Any]:
            completion, item = completions.slice(row, 1).to_pylist()[0], rows.items[row]
            inputs = item.parsed.inputs if item.parsed else {}
            columns = item.row.columns or {}
            return shown_row(item.id, first + row, rows.messages(row), item.row.raw, columns, completion, inputs)

        columns = {column.name: data[column.name] for column in self.columns.answers} or {
            "response": completions["response"]
        }
        rows_of: dict[str, npt.NDArray[np.bool_]] = {}
        if self.columns.values:
            tasks = np.array(rows.tasks)
            rows_of["response"] = tasks == CHAT
            if not rows_of["response"].any():
                del columns["response"]
            for column, name, values in report_columns(completions):
                columns[name] = values
                rows_of[name] = np.isin(tasks, [task for task, kind in TASKS.items() if column in kind.columns])
        ids = [item.id for item in rows.items]
        stats.add(answers.positions, first, completions, answers.done_at, ids, show, columns, rows_of)

    def _finish(self, part: _OpenPart, result: JobResult) -> None:
        for file in (part.data, part.errors) if part.errors.rows else (part.data,):
            file.write(self.fs, self.root)
            result.files[file.path] = file.rows
        if self.output.table is not None:
            result.keys[part.data.path] = bytes(part.keys)


class _OpenPart:
    """The files of the part that is being written."""

    def __init__(self, number: int, form: str) -> None:
        self.number, self.keys = number, bytearray()
        self.data, self.errors = PartFile(part_name(DATA, number, form)), PartFile(part_name(ERRORS, number, form))
