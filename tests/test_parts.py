"""Parts of the output are bounded by rows and by bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.file_split import FileSplit
from pipeline.dataset.reader import ReadSplit, SplitSummary
from pipeline.output import answers, input_rows, plan
from pipeline.output.plan import PART_BYTES, plan_jobs
from tests.support.infer import Infer, ask

Write = Callable[..., Path]
MB = 1 << 20

blocks = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60 * MB)), max_size=6)


@given(st.lists(blocks, max_size=6), st.integers(1, 50), st.integers(0, 3 * MB))
def test_each_part_holds_as_many_rows_as_its_bytes_allow(
    splits: list[list[tuple[int, int]]], rows_per_part: int, answer_bytes: int
) -> None:
    found = [ReadSplit(n, FileSplit("f", "f", "jsonl", 0, 0, 0)) for n in range(len(splits))]
    summaries = {n: SplitSummary(rows=sum(r for r, _ in split), blocks=split) for n, split in enumerate(splits)}
    jobs = plan_jobs(found, summaries, answer_bytes, rows_per_part)
    sizes = [size / rows + answer_bytes for split in splits for rows, size in split for _ in range(rows)]
    assert sum(sum(job.part_rows) for job in jobs) == len(sizes)
    at = part = 0
    for job in jobs:
        assert (job.index, job.first_part) == (at, part)
        for rows in job.part_rows:
            assert rows <= rows_per_part
            assert rows <= 1 or sum(sizes[at : at + rows]) <= 1.001 * PART_BYTES
            at, part = at + rows, part + 1
    assert [split.number for job in jobs for split in job.splits] == list(range(sum(len(job.splits) for job in jobs)))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_large_rows_become_small_parts_of_small_row_groups_and_nothing_else_changes(
    infer: Infer, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(plan, "PART_BYTES", 400_000)
    monkeypatch.setattr(input_rows, "PIECE_BYTES", 100_000)
    monkeypatch.setattr(answers, "PIECE_BYTES", 40_000)
    texts = [f"{n} " + "x" * (20_000 if n % 3 else 10) for n in range(90)]
    rows = [ask(text, id=f"r{n}", note=n) for n, text in enumerate(texts)]
    rows[40] = {"messages": []}
    infer(write_jsonl(rows), f"output={form}")
    parts = sorted((infer.out / "data").iterdir())
    assert len(parts) >= 5
    if form == "parquet":
        files = [pq.ParquetFile(path) for path in parts]
        assert all(file.schema_arrow == files[0].schema_arrow for file in files)
        assert max(file.metadata.num_row_groups for file in files) > 2
        out = pa.concat_tables([file.read() for file in files]).to_pylist()
        (error,) = pa.concat_tables([pq.read_table(path) for path in (infer.out / "errors").iterdir()]).to_pylist()
    else:
        out = [json.loads(line) for path in parts for line in path.read_text().splitlines()]
        (error,) = [json.loads(p) for path in (infer.out / "errors").iterdir() for p in path.read_text().splitlines()]
    assert [row["index"] for row in out] == list(range(90))
    assert [row["response"] for row in out] == [text if n != 40 else None for n, text in enumerate(texts)]
    assert [row["note"] for row in out] == [n if n != 40 else None for n in range(90)]
    assert error["error"]["type"] == "invalid_input"
