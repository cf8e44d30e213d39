"""The plan of the output: its part files and its columns. `pipeline/dataset/plan.py` plans the input."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from engines.tasks import CHAT, TASKS
from pipeline.dataset.arrow_rows import table_schema
from pipeline.dataset.column_types import ColumnKinds, common_type, stored_type, type_of
from pipeline.dataset.formats import OUTPUT_COLUMNS, REFERENCE, passthrough_names
from pipeline.dataset.reader import ReadSplit, RowReader, SplitSummary
from pipeline.output.answer_columns import AnswerColumn
from pipeline.storage.ledger import ANSWER_SCHEMA, COMPLETION_COLUMNS, VALUE_COLUMNS, with_values
from pipeline.storage.output_files import DATA, ERRORS

# The maximum rows of a part, and the approximate maximum bytes of its rows in memory.
ROWS_PER_PART, PART_BYTES = 32_768, 128 << 20

# Column -> the generation parameter that fills it. The column exists only if the run or some row sets the parameter.
OPTIONAL = {"choices": "n", "logprobs": "logprobs", "token_logprobs": "logprobs"}


@dataclass(frozen=True, slots=True)
class Job:
    """Consecutive splits, and the part files made from them. `index`: the position of the first row in the whole input."""

    splits: list[ReadSplit]
    index: int
    first_part: int
    part_rows: list[int]


def plan_jobs(
    splits: Sequence[ReadSplit],
    summaries: Mapping[int, SplitSummary],
    answer_bytes: float = 0.0,
    rows_per_part: int = ROWS_PER_PART,
) -> list[Job]:
    """Groups the splits, in order, into jobs of about one part or more. A large split becomes several parts.

    `answer_bytes` is the mean size of an answer.
    """
    jobs: list[Job] = []
    group: list[ReadSplit] = []
    blocks: list[tuple[int, float]] = []
    index = part = 0
    for at, split in enumerate(splits):
        summary = summaries[split.number]
        group.append(replace(split, earlier=summary.earlier) if len(summary.earlier[0]) else split)
        blocks += [(rows, size + rows * answer_bytes) for rows, size in summary.blocks]
        rows, size = sum(rows for rows, _ in blocks), sum(size for _, size in blocks)
        full = rows >= rows_per_part or size >= PART_BYTES
        if full or (at + 1 == len(splits) and (rows or not jobs)):
            part_rows = _part_rows(blocks, rows, size, rows_per_part)
            jobs.append(Job(group, index, part, part_rows))
            index, part = index + rows, part + len(part_rows)
            group, blocks = [], []
    return jobs


def _part_rows(blocks: Sequence[tuple[int, float]], rows: int, size: float, rows_per_part: int) -> list[int]:
    """The rows of each part: equal numbers or, if the rows are large, equal sizes of at most `PART_BYTES`."""
    if size <= PART_BYTES:
        parts = max(1, -(-rows // rows_per_part))
        each = -(-rows // parts)
        return [min(each, rows - start) for start in range(0, rows, each)] if rows else [0]
    target = size / -(-size // PART_BYTES)
    found: list[int] = []
    count, held = 0, 0.0
    for block_rows, block_size in blocks:
        left = block_rows
        while left:
            row_size = max(1.0, block_size / block_rows)
            room = min(math.ceil((target - held) / row_size), int((PART_BYTES - held) // row_size))
            take = min(left, rows_per_part - count, room)
            if take <= 0 and count:
                found.append(count)
                count, held = 0, 0.0
                continue
            take = max(1, take)
            count, held, left = count + take, held + take * row_size, left - take
    return [*found, count] if count else found


def part_names(jobs: Sequence[Job], form: str) -> Iterator[str]:
    """Every file that these jobs may write, below the output."""
    for job in jobs:
        for part in range(job.first_part, job.first_part + len(job.part_rows)):
            yield from (part_name(folder, part, form) for folder in (DATA, ERRORS))


def part_name(folder: str, part: int, form: str) -> str:
    """The path of a part file below the output."""
    return f"{folder}/part-{part:05d}.{form}"


@dataclass(frozen=True, slots=True)
class InputColumn:
    """One of the input's own columns."""

    source: str
    name: str | None  # in data/; None: not in data/ (see `passthrough_names`)
    type: pa.DataType | None  # None: written as JSON text


@dataclass(frozen=True, slots=True)
class OutputColumns:
    """All columns of data/, the same in every part, and what errors/ needs."""

    own: list[InputColumn]
    answers: Sequence[AnswerColumn]  # the columns of `output.columns`
    optional: Sequence[str]  # columns of `OPTIONAL`
    raw: bool  # some line of the input could not be read: errors/ has the column `raw`
    references: bool  # some conversation ended with an answer that was not sent: data/ has the column `reference`
    # The columns of tasks other than a chat, and their types.
    values: Mapping[str, pa.DataType] = field(default_factory=dict)

    @property
    def answer_schema(self) -> pa.Schema:
        """The columns to read from the ledger."""
        return with_values(ANSWER_SCHEMA, self.values)

    @property
    def data_schema(self) -> pa.Schema:
        """`id`, `index`, the input's own columns, the columns of `output.columns` or of tasks, then the engine's."""
        own = [pa.field(c.name, c.type or pa.string()) for c in self.own if c.name is not None]
        out = [pa.field(c.name, c.type or pa.string()) for c in self.answers]
        names = [n for n in COMPLETION_COLUMNS if n in OUTPUT_COLUMNS and (n not in OPTIONAL or n in self.optional)]
        first, *rest = [pa.field(name, COMPLETION_COLUMNS[name][0]) for name in names]
        reference = [pa.field(REFERENCE, pa.string())] if self.references else []
        fields = [
            ("id", pa.string()),
            ("index", pa.int64()),
            *own,
            *reference,
            *out,
            *self.values.items(),
            first,
            ("messages", pa.string()),
            *rest,
        ]
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
    embedding: pa.DataType | None = None,
) -> OutputColumns:
    """The input's own columns with one type each over all files, in the order they first appear. `params`: the generation
    parameters of the run. `embedding`: the type of this column."""
    types: dict[str, pa.DataType | None] = {}
    kinds = ColumnKinds()
    files: set[str] = set()
    for split in splits:
        if not split.file_split.typed:
            kinds.merge(summaries[split.number].kinds)
        elif split.file_split.file not in files:
            files.add(split.file_split.file)
            for column in table_schema(split.file_split):
                type = stored_type(column.type)
                types[column.name] = common_type(types.get(column.name, type), type)
    for name, bits in kinds.bits.items():
        types[name] = common_type(types.get(name, type_of(bits)), type_of(bits))
    references = any(summary.references for summary in summaries.values())
    found = set(params).union(*(summary.params for summary in summaries.values()))
    optional = [name for name, param in OPTIONAL.items() if param in found]
    tasks = {row_reader.parser.task}.union(*(summary.tasks for summary in summaries.values()))
    of_tasks = [name for task, kind in TASKS.items() if task in tasks for name in kind.columns]
    values = {name: VALUE_COLUMNS[name] for name in of_tasks if name not in OPTIONAL or name in optional}
    if embedding is not None and "embedding" in values:
        values["embedding"] = embedding
    if CHAT not in tasks:
        optional = []
    taken = {column.name for column in answers} | ({REFERENCE} if references else set()) | values.keys()
    names = passthrough_names(types, row_reader.parser, taken)
    own = [InputColumn(source, names.get(source), type) for source, type in types.items()]
    invalid = any(summary.invalid for summary in summaries.values())
    return OutputColumns(own, answers, optional, invalid, references, values)


def embedding_type(number: str, lengths: Collection[int]) -> pa.DataType:
    """The type of embeddings with these lengths: a list of fixed size if there is only one. `number`: the type of the
    numbers (`output.embedding`)."""
    return pa.list_(pa.type_for_alias(number), next(iter(lengths)) if len(lengths) == 1 else -1)
