"""The plan of the output: its part files and its columns. `pipeline/dataset/plan.py` plans the input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.dataset.column_types import ColumnKinds, common_type, type_of
from pipeline.dataset.formats import OUTPUT_COLUMNS, passthrough_names
from pipeline.dataset.reader import ReadSplit, RowReader, SplitSummary
from pipeline.dataset.source import parquet_schema
from pipeline.output.answer_columns import AnswerColumn
from pipeline.storage.ledger import COMPLETION_COLUMNS
from pipeline.storage.output_files import DATA, ERRORS

ROWS_PER_PART = 32_768

# Columns that exist only if some row sets the parameter they come from.
OPTIONAL = {"choices": "n", "logprobs": "logprobs"}


@dataclass(frozen=True, slots=True)
class Job:
    """Consecutive splits, and the part files they become. `index` is the first row's in the whole input."""

    splits: list[ReadSplit]
    rows: int
    index: int
    first_part: int
    parts: int


def plan_jobs(
    splits: Sequence[ReadSplit], summaries: Mapping[int, SplitSummary], rows_per_part: int = ROWS_PER_PART
) -> list[Job]:
    """Groups the splits, in order, into jobs of about one part or more. A large split becomes several parts."""
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


@dataclass(frozen=True, slots=True)
class InputColumn:
    """One of the input's own columns."""

    source: str
    name: str | None  # in data/; None if a column of the answers has that name and holds it
    type: pa.DataType | None  # None: written as JSON text


@dataclass(frozen=True, slots=True)
class OutputColumns:
    """All columns of the output: the same in every part."""

    own: list[InputColumn]
    answers: Sequence[AnswerColumn]  # taken out of answers, by `output.columns`
    optional: Sequence[str]  # columns of `OPTIONAL`
    raw: bool  # some line of the input could not be read: errors/ has the column `raw`

    @property
    def data_schema(self) -> pa.Schema:
        """`id`, `index`, the input's own columns, those out of the answers, then what the engine gave."""
        own = [pa.field(c.name, c.type or pa.string()) for c in self.own if c.name is not None]
        out = [pa.field(c.name, c.type or pa.string()) for c in self.answers]
        names = [n for n in COMPLETION_COLUMNS if n in OUTPUT_COLUMNS and (n not in OPTIONAL or n in self.optional)]
        first, *rest = [pa.field(name, COMPLETION_COLUMNS[name][0]) for name in names]
        fields = [("id", pa.string()), ("index", pa.int64()), *own, *out, first, ("messages", pa.string()), *rest]
        return pa.schema(fields)

    @property
    def own_schema(self) -> pa.Schema:
        """The input's own columns under their own names."""
        return pa.schema([(c.source, c.type or pa.string()) for c in self.own])


def plan_columns(
    splits: Sequence[ReadSplit],
    summaries: Mapping[int, SplitSummary],
    row_reader: RowReader,
    answers: Sequence[AnswerColumn] = (),
    params: Sequence[str] = (),
) -> OutputColumns:
    """The input's own columns with one type each over all files, in the order they first appear. `params`: the generation
    parameters of the run."""
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
    names = passthrough_names(types, row_reader.parser, {column.name for column in answers})
    own = [InputColumn(source, names.get(source), type) for source, type in types.items()]
    found = set(params).union(*(summary.params for summary in summaries.values()))
    optional = [name for name, param in OPTIONAL.items() if param in found]
    return OutputColumns(own, answers, optional, any(summary.invalid for summary in summaries.values()))
