"""docs/scale.md: its figures are those of the code and of the measurements."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import numpy as np

from bench import scale_tables
from pipeline.config import DatasetConfig
from pipeline.output.plan import ROWS_PER_PART
from pipeline.storage.ledger import GROUP_ROWS
from pipeline.storage.ledger_index import DedupFilter, Index

PAGE = " ".join((Path(__file__).parents[1] / "docs" / "scale.md").read_text().split())


def test_the_bytes_of_a_row_are_those_of_the_code() -> None:
    parts = scale_tables.results()["costs"]["parts"]
    index = Index.empty()
    arrays = [value for field in fields(index) if isinstance(value := getattr(index, field.name), np.ndarray)]
    columns = [array for array in arrays if array is not index.row_bytes]  # that one has an element for each segment
    assert sum(array.itemsize * (array.shape[1] if array.ndim > 1 else 1) for array in columns) == parts["index_bytes"]
    keys = DedupFilter()
    keys.add([bytes(32)])
    assert sum(run.nbytes for run in keys._runs) == parts["dedup_bytes"]


def test_the_numbers_in_the_text_are_those_of_the_code() -> None:
    assert f"each part of {ROWS_PER_PART:,} rows" in PAGE and f"row groups of {GROUP_ROWS:,} rows" in PAGE
    rate = scale_tables.GPUS * scale_tables.ANSWERS_PER_S
    assert f"{rate:,} rows a second" in PAGE
    assert f"`dataset.chunk_bytes` ({DatasetConfig().chunk_bytes >> 20} MiB)" in PAGE


def test_every_measured_kind_has_a_place_in_the_tables() -> None:
    found = scale_tables.results()
    assert set(scale_tables.PARTS) | set(scale_tables.BYTES) == set(found["costs"]["parts"])
    assert set(scale_tables.ONE) <= set(found["run"]["cpu_us_per_row"])
    assert not re.search(r"nan|None", "".join(table() for table in scale_tables.TABLES.values()))
