"""From segments to the final output: every input row once, in input order, in one schema.

Each job is one Ray task, which reads its piece of the input again (the input's own columns never travel through the
workers) and looks every row's key up in the ledger. Killed at any point, it is simply done again; what commits the
whole is the manifest, written last by the caller.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from engines.errors import Failure
from engines.types import Completion, answer
from pipeline.config import OutputConfig
from pipeline.dataset.column_types import ColumnKinds, common_type, to_array, type_of
from pipeline.dataset.formats import OUTPUT_COLUMNS, passthrough_names
from pipeline.dataset.reader import ParsedRow, ReadSplit, RowReader, SplitSummary
from pipeline.dataset.source import parquet_schema, read_table
from pipeline.output.answer_columns import AnswerColumn, answer_arrays
from pipeline.output.jsonl_styles import STYLES
from pipeline.report.conversation import shown_row
from pipeline.report.stats import Stats
from pipeline.storage.exact_json import dumps, loads, plain
from pipeline.storage.filesystem import resolve, write_atomic
from pipeline.storage.ledger import ANSWER_SCHEMA, COMPLETION_FIELDS, ERROR, completion_columns, read_rows
from pipeline.storage.ledger_index import Index, RemoteIndex
from pipeline.storage.output_files import DATA, ERRORS

ROWS_PER_PART = 32_768

# Columns that are there only where some row sets the parameter they come from.
OPTIONAL = {"choices": "n", "logprobs": "logprobs"}
# Columns of ours that hold JSON text.
JSON_TEXT = ("messages", "tool_calls", "choices", "logprobs")


@dataclass(frozen=True, slots=True)
class OutputColumn:
    """One of the input's own columns. `name` is its name in data/, None where a column of ours holds it already;
    `type` None stands for JSON text."""

    source: str
    name: str | None
    type: pa.DataType | None


@dataclass(frozen=True, slots=True)
class Job:
    """Whole splits that lie together, and the part files they become. `index` is the first row's in the whole input."""

    splits: list[ReadSplit]
    rows: int
    index: int
    first_part: int
    parts: int


@dataclass(slots=True)
class JobResult:
    rows: int = 0
    failed: int = 0
    missing: int = 0  # rows that no segment answers: the run is not over
    errors: Counter[str] = field(default_factory=Counter)
    used: list[npt.NDArray[Any]] = field(
        default_factory=list
    )  # positions in the index; of all jobs together, one mask of it
    files: dict[str, int] = field(default_factory=dict)  # path below the output -> rows
    stats: Stats = field(default_factory=Stats)


def plan_jobs(
    splits: Sequence[ReadSplit], summaries: Mapping[int, SplitSummary], rows_per_part: int = ROWS_PER_PART
) -> list[Job]:
    """Groups the splits, in order, into jobs of about a part or more; a large split becomes several parts."""
    jobs: list[Job] = []
    group: list[ReadSplit] = []
    rows = index = part = 0
    for at, split in enumerate(splits):
        group.append(split)
        rows += summaries[split.number].rows
        if rows >= rows_per_part or (at + 1 == len(splits) and (rows or not jobs)):
            parts = max(1, -(-rows // rows_per_part))
            jobs.append(Job(group, rows, index, part, parts))
            index, part = index + rows, part + parts
            group, rows = [], 0
    return jobs


def part_names(jobs: Sequence[Job], form: str) -> Iterator[str]:
    """Every file that these jobs may write, below the output."""
    for job in jobs:
        for part in range(job.first_part, job.first_part + job.parts):
            yield from (part_name(folder, part, form) for folder in (DATA, ERRORS))


def part_name(folder: str, part: int, form: str) -> str:
    """The path of a part file below the output."""
    return f"{folder}/part-{part:05d}.{form}"


def plan_columns(
    splits: Sequence[ReadSplit],
    summaries: Mapping[int, SplitSummary],
    row_reader: RowReader,
    answer_columns: Sequence[AnswerColumn] = (),
) -> list[OutputColumn]:
    """The input's own columns with one type each over all files, in the order they first appear."""
    types: dict[str, pa.DataType | None] = {}
    kinds = ColumnKinds()
    files: set[str] = set()
    for split in splits:
        if split.file_split.kind != "parquet":
            kinds.merge(summaries[split.number].kinds)
        elif split.file_split.file not in files:
            files.add(split.file_split.file)
            for column in parquet_schema(split.file_split):
                types[column.name] = common_type(types.get(column.name, column.type), column.type)
    for name, bits in kinds.bits.items():
        types[name] = common_type(types.get(name, type_of(bits)), type_of(bits))
    names = passthrough_names(types, row_reader.parser, {answer_column.name for answer_column in answer_columns})
    return [OutputColumn(source, names.get(source), type) for source, type in types.items()]


def output_schema(
    columns: Sequence[OutputColumn], optional: Sequence[str], answer_columns: Sequence[AnswerColumn] = ()
) -> pa.Schema:
    """`id`, `index`, the input's own columns, those out of the answers, then what the engine gave."""
    own = [pa.field(c.name, c.type or pa.string()) for c in columns if c.name is not None]
    out = [pa.field(answer_column.name, answer_column.type or pa.string()) for answer_column in answer_columns]
    given = [(n, t) for n, t in COMPLETION_FIELDS if n in OUTPUT_COLUMNS and (n not in OPTIONAL or n in optional)]
    first, *rest = [pa.field(n, t) for n, t in given]
    return pa.schema([("id", pa.string()), ("index", pa.int64()), *own, *out, first, ("messages", pa.string()), *rest])


@dataclass(slots=True)
class _OutputRows:
    """Input rows on their way into one part file."""

    ids: list[str] = field(default_factory=list)
    keys: list[bytes | None] = field(default_factory=list)
    messages: list[bytes | None] = field(default_factory=list)
    failures: list[Failure | None] = field(default_factory=list)
    raw: list[bytes | None] = field(default_factory=list)
    values: list[Mapping[str, Any]] = field(default_factory=list)  # the columns as Python values
    own: list[pa.Table] = field(default_factory=list)  # the columns as Arrow, all of them

    def add(self, items: Sequence[ParsedRow], own: pa.Table) -> None:
        self.own.append(own)
        for item in items:
            self.ids.append(item.id)
            self.keys.append(item.key)
            self.messages.append(dumps(item.parsed.messages) if item.parsed else None)
            self.failures.append(item.failure)
            self.raw.append(item.row.raw)
            self.values.append(item.row.columns or {})


class PartWriter:
    """Does jobs: reads, looks up, writes."""

    def __init__(
        self,
        row_reader: RowReader,
        columns: list[OutputColumn],
        optional: Sequence[str],
        raw: bool,
        output: OutputConfig,
        answer_columns: Sequence[AnswerColumn] = (),
    ) -> None:
        self.row_reader, self.columns, self.output = row_reader, columns, output
        self.raw = raw  # whether some line of the input could not be read
        self.answer_columns = answer_columns
        self.schema = output_schema(columns, optional, answer_columns)
        self.own_schema = pa.schema([(c.source, c.type or pa.string()) for c in columns])
        self.fs, self.root = resolve(str(output.path))

    def run(self, job: Job, answers: Index | RemoteIndex) -> JobResult:
        """Writes the job's `data/part-N` files and, where rows failed, `errors/part-N`; stops at a missing row."""
        result = JobResult()
        size = -(-job.rows // job.parts)
        part, first, rows = job.first_part, job.index, _OutputRows()
        read = 0
        for items, own in self._read(job.splits):
            read += len(items)
            if read > job.rows:
                break
            while items:
                room = size - len(rows.ids)
                rows.add(items[:room], own.slice(0, room))
                items, own = items[room:], own.slice(room)
                if len(rows.ids) == size:
                    self._write(part, first, rows, answers, result)
                    if result.missing:
                        return result
                    part, first, rows = part + 1, first + size, _OutputRows()
        if read != job.rows:  # never a shorter or shifted output because a read broke off
            raise OSError(
                f"{job.splits[0].file_split.name} and on: {read} rows where there were {job.rows}; did the input change?"
            )
        if rows.ids or not result.files:
            self._write(part, first, rows, answers, result)
        return result

    def _read(self, splits: Sequence[ReadSplit]) -> Iterator[tuple[list[ParsedRow], pa.Table]]:
        """Items with their columns as Arrow: taken as they are from Parquet, built from the values otherwise."""
        for split in splits:
            batches = read_table(split.file_split) if split.file_split.kind == "parquet" else iter(())
            for items in self.row_reader.read(split):
                batch = next(batches, None)
                if batch is not None and batch.num_rows >= len(items):
                    yield items, self._conform(batch.slice(0, len(items)))
                else:
                    values = [item.row.columns or {} for item in items]
                    yield items, self._build(values)

    def _conform(self, batch: pa.RecordBatch) -> pa.Table:
        columns = []
        for column in self.columns:
            if column.source not in batch.schema.names:
                columns.append(pa.nulls(batch.num_rows, column.type or pa.string()))
            elif column.type is None:
                columns.append(to_array(batch[column.source].to_pylist(), None))
            else:
                columns.append(batch[column.source].cast(column.type))
        return pa.Table.from_arrays(columns, schema=self.own_schema)

    def _build(self, values: Sequence[Mapping[str, Any]]) -> pa.Table:
        columns = [to_array([row.get(c.source) for row in values], c.type) for c in self.columns]
        return pa.Table.from_arrays(columns, schema=self.own_schema)

    def _write(self, part: int, first: int, rows: _OutputRows, answers: Index | RemoteIndex, result: JobResult) -> None:
        at = np.full(len(rows.ids), -1, np.int64)
        keyed = np.array([key is not None for key in rows.keys], np.bool_)
        at[keyed], *where = answers.locate([key for key in rows.keys if key is not None])
        result.missing += int((keyed & (at < 0)).sum())
        if result.missing:
            return
        completions, done_at = self._completions(rows, at, answers.paths, *where)
        failed = np.asarray(completions["error"].is_valid())
        result.rows += len(rows.ids)
        result.failed += int(failed.sum())
        result.errors.update(error["type"] for error in completions["error"].drop_null().to_pylist())
        result.used.append(at[at >= 0].astype(np.uint32))
        own = pa.concat_tables(rows.own) if rows.own else self.own_schema.empty_table()
        form = self.output.format
        self._save(part_name(DATA, part, form), self._data(rows, own, completions, first), rows.values, result)
        if failed.any():
            wrong = np.flatnonzero(failed)
            self._save(part_name(ERRORS, part, form), self._errors(rows, own, completions, wrong), [], result)
        self._count(at, first, rows, completions, done_at, result.stats)

    def _count(
        self,
        at: npt.NDArray[np.int64],
        first: int,
        rows: _OutputRows,
        completions: pa.Table,
        done_at: pa.ChunkedArray,
        stats: Stats,
    ) -> None:
        """Adds to what the report tells."""

        def show(row: int) -> dict[str, Any]:
            completion = completions.slice(row, 1).to_pylist()[0]
            own = (rows.ids[row], first + row, rows.messages[row], rows.raw[row], rows.values[row])
            return shown_row(*own, completion)

        stats.add(at, first, completions, done_at, rows.ids, show)

    def _completions(
        self,
        rows: _OutputRows,
        at: npt.NDArray[np.int64],
        paths: list[str],
        segment: npt.NDArray[np.int32],
        row: npt.NDArray[np.int32],
    ) -> tuple[pa.Table, pa.ChunkedArray]:
        """What came back for each row, in the rows' order, and when; every segment is opened once."""
        tables: list[pa.Table] = []
        order: list[npt.NDArray[np.int64]] = []
        answered = np.flatnonzero(at >= 0)
        for number in np.unique(segment):
            mine = segment == number
            tables.append(read_rows(self.fs, paths[number], row[mine]))
            order.append(answered[mine])
        unasked = np.flatnonzero(at < 0)
        if len(unasked) or not tables:
            failures = [Completion(error=rows.failures[row], attempts=0) for row in unasked]
            never = pa.nulls(len(failures), ANSWER_SCHEMA.field("done_at").type)
            tables.append(pa.Table.from_arrays([*completion_columns(failures), never], schema=ANSWER_SCHEMA))
            order.append(unasked)
        back = np.argsort(np.concatenate(order), kind="stable")
        table = pa.concat_tables(tables).take(pa.array(back))
        return table.drop_columns("done_at"), table["done_at"]

    def _data(self, rows: _OutputRows, own: pa.Table, completions: pa.Table, index: int) -> pa.Table:
        columns: dict[str, Any] = {
            "id": pa.array(rows.ids, pa.string()),
            "index": pa.array(np.arange(index, index + len(rows.ids))),
            "messages": pa.array(
                [
                    _with_answer(messages, dialogue, text, calls, more, error is None)
                    for messages, dialogue, text, calls, more, error in zip(
                        rows.messages,
                        completions["dialogue"].to_pylist(),
                        completions["response"].to_pylist(),
                        completions["tool_calls"].to_pylist(),
                        completions["message_fields"].to_pylist(),
                        completions["error"].to_pylist(),
                        strict=True,
                    )
                ],
                pa.string(),
            ),
        }
        columns.update({c.name: own[c.source] for c in self.columns if c.name is not None})
        given = set(self.schema.names) & set(OUTPUT_COLUMNS) & set(completions.column_names)
        columns.update({name: completions[name] for name in given})
        if self.answer_columns:  # a failed row has no response
            columns.update(answer_arrays(self.answer_columns, completions["response"].to_pylist()))
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)

    def _errors(self, rows: _OutputRows, own: pa.Table, completions: pa.Table, wrong: npt.NDArray[np.intp]) -> pa.Table:
        """The failed rows as they came, under their own names, so that they can be run again; and why they failed."""
        take = pa.array(wrong)
        columns: dict[str, Any] = {}
        if "id" not in own.column_names:
            columns["id"] = pa.array([rows.ids[row] for row in wrong], pa.string())
        for name in own.column_names:
            columns["input_error" if name == "error" else name] = own[name].take(take)
        if self.raw and "raw" not in columns:
            columns["raw"] = pa.array([(rows.raw[row] or b"").decode("utf-8", "backslashreplace") or None for row in wrong])
        columns["error"] = completions["error"].take(take).cast(ERROR)
        return pa.table(columns)

    def _save(self, path: str, table: pa.Table, values: Sequence[Mapping[str, Any]], result: JobResult) -> None:
        if self.output.format == "jsonl":
            data = self._lines(path, table, values)
        else:
            sink = io.BytesIO()
            pq.write_table(table, sink, compression="zstd")
            data = sink.getvalue()
        write_atomic(self.fs, f"{self.root}/{path}", data)
        result.files[path] = len(table)

    def _lines(self, path: str, table: pa.Table, values: Sequence[Mapping[str, Any]]) -> bytes:
        """JSON lines; JSON text becomes JSON again, and the input's own values are written as they came."""
        own = {c.name: c.source for c in self.columns if c.name is not None} if values else {}
        texts = (
            (s.name for s in self.answer_columns if s.type is None)
            if values
            else (c.source for c in self.columns if c.type is None)
        )
        in_json = {*JSON_TEXT, *texts}
        style = STYLES[self.output.style if path.startswith(DATA) else "eagleray"]
        lines = []
        for at, row in enumerate(table.to_pylist()):
            for name in row:
                if name in own:
                    row[name] = values[at].get(own[name])
                elif name in in_json and isinstance(row[name], str):
                    row[name] = _embedded(row[name])
            lines.append(_line(style(row)))
        return b"".join(lines)


def _with_answer(
    messages: bytes | None, dialogue: str | None, text: str | None, calls: str | None, more: str | None, answered: bool
) -> bytes | None:
    if messages is not None and dialogue is not None:
        messages = messages[:-1] + b"," + dialogue[1:].encode()
    if messages is None or not answered:
        return messages
    reply = dumps({**answer(text, loads(calls.encode()) if calls else None), **(loads(more.encode()) if more else {})})
    return messages[:-1] + b"," + reply + b"]"


def _embedded(text: str) -> Any:
    try:
        return loads(text.encode())
    except ValueError:  # the input's own column of that name held other text
        return text


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(row, default=plain, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # an integer beyond 64 bits
        return json.dumps(row, ensure_ascii=False, separators=(",", ":"), default=plain).encode() + b"\n"
