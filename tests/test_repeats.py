"""Rows with equal keys are numbered in the order of the input, in one process and split by split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engines.config import EngineConfig
from engines.params import GenerationParams
from pipeline.dataset.formats import RowParser
from pipeline.dataset.keys import RequestHasher, numbered
from pipeline.dataset.occurrences import Occurrences
from pipeline.dataset.reader import ReadSplit, RowReader, SplitSummary
from pipeline.dataset.repeats import RepeatCounter, with_earlier
from pipeline.dataset.source import list_file_splits
from pipeline.executors.requests import read_split
from pipeline.storage.ledger_index import Index, split_keys
from tests.support.infer import ask

Write = Callable[..., Path]


def key(n: int) -> bytes:
    return hashlib.sha256(str(n).encode()).digest()


@given(st.lists(st.lists(st.lists(st.integers(0, 6), max_size=8), max_size=4), max_size=5))
def test_the_number_of_a_row_is_its_position_among_its_equals(splits: list[list[list[int]]]) -> None:
    """Also of a split that is read alone, with what was found of the splits before it."""
    whole, before = Occurrences(), Counter[int]()
    for split in splits:
        whole.begin_split()
        expected, at_start = [], dict(before)
        for batch in split:
            for n in batch:
                expected.append(before[n])
                before[n] += 1
        assert [number for batch in split for number in whole.number([key(n) for n in batch])] == expected
        earlier = dict(zip(*(column.tolist() for column in whole.earlier()), strict=True))
        hashes = {n: int(split_keys([key(n)])[0][0]) for batch in split for n in batch}
        assert earlier == {hashes[n]: at_start[n] for n in hashes if at_start.get(n)}
        alone = Occurrences(whole.earlier())
        alone.begin_split()
        assert [number for batch in split for number in alone.number([key(n) for n in batch])] == expected


def test_splits_that_are_counted_one_by_one_get_the_keys_of_one_reader(write_jsonl: Write, tmp_path: Path) -> None:
    for name in "abc":
        write_jsonl([ask("x", id=f"task/{n % 3}") for n in range(40)], f"in/{name}.jsonl")
    found = list_file_splits(tmp_path / "in", chunk_bytes=700)
    splits = [ReadSplit(number, file_split) for number, file_split in enumerate(found)]
    assert len(splits) > 6
    hasher = RequestHasher(EngineConfig(kind="echo"), GenerationParams(temperature=1.0))
    reader = RowReader(RowParser(), hasher, 1 << 20)

    together = Occurrences()
    keys = [[item.key for items in reader.read(split, together) for item in items] for split in splits]
    bases = [reader.hasher.key(item.parsed, "") for items in reader.parse(splits[0]) for item in items if item.parsed]
    assert set(keys[0]) >= {numbered(base, 0) for base in bases}
    assert len({key for split in keys for key in split}) == 120

    repeated = np.unique(split_keys(bases)[0])
    counter = RepeatCounter(reader, repeated)
    counted = with_earlier(splits, [counter.run(split, Index.empty()) for split in reversed(splits)])
    assert [[item.key for items in reader.read(split) for item in items] for split in counted] == keys

    occurrences = Occurrences()
    for split, known in zip(splits, counted, strict=True):
        summary = SplitSummary()
        list(read_split(split, reader, Index.empty(), False, summary, occurrences))
        order = np.argsort(summary.earlier[0])
        expected = np.argsort(known.earlier[0])
        for mine, other in zip(summary.earlier, known.earlier, strict=True):
            assert mine[order].tolist() == other[expected].tolist()
