"""Counts rows whose keys repeat over several splits, so that each split can number its rows: see `occurrences.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.dataset.occurrences import Earlier
from pipeline.dataset.reader import ReadSplit, RowReader
from pipeline.storage.ledger_index import KeyLookup, split_keys


class RepeatCounter:
    """Counts, in each split, the rows with certain keys. `repeated`: the first 64 bits of these keys, sorted."""

    def __init__(self, row_reader: RowReader, repeated: npt.NDArray[np.uint64]) -> None:
        self.row_reader, self.repeated = row_reader, repeated

    def run(self, split: ReadSplit, lookup: KeyLookup) -> tuple[int, Earlier]:
        """The number of the split; the keys in it, and the number of rows with each."""
        counts = np.zeros(len(self.repeated), np.uint32)
        for items in self.row_reader.parse(split):
            keys = [item.key for item in items if item.key is not None and item.is_numbered]
            if keys:
                hashes, _ = split_keys(keys)
                at = np.minimum(np.searchsorted(self.repeated, hashes), len(self.repeated) - 1)
                np.add.at(counts, at[self.repeated[at] == hashes], 1)
        there = np.flatnonzero(counts)
        return split.number, (self.repeated[there], counts[there])


def with_earlier(splits: Sequence[ReadSplit], counted: Iterable[tuple[int, Earlier]]) -> list[ReadSplit]:
    """The splits, each with the number of rows before it for the keys that `RepeatCounter` counted."""
    by_number = dict(counted)
    before: dict[int, int] = {}
    found = []
    for split in splits:
        keys, counts = by_number[split.number]
        repeated = [key for key in keys.tolist() if key in before]
        earlier = np.array(repeated, np.uint64), np.array([before[key] for key in repeated], np.uint32)
        found.append(dataclasses.replace(split, earlier=earlier))
        for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
            before[key] = before.get(key, 0) + count
    return found
