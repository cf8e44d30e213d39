"""The plan of the input: the splits that read tasks read. `pipeline/output/plan.py` plans the output."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from rich.console import Console

from pipeline.config import Config, DatasetConfig
from pipeline.dataset.arrow_rows import parquet_rows
from pipeline.dataset.file_split import FileSplit
from pipeline.dataset.read import read_file_split
from pipeline.dataset.reader import ReadSplit
from pipeline.dataset.source import list_file_splits
from pipeline.dataset.stdin import STDIN, PipedInput, receive
from pipeline.dataset.templates import Template
from pipeline.monitor.console import warn

# An input of up to this many files and bytes is read in one process, because starting others takes seconds.
SMALL_FILES, SMALL_BYTES = 8, 8 << 20


@dataclass(slots=True)
class SplitInput:
    """The whole input, split into read tasks."""

    splits: list[ReadSplit]
    small: bool  # the input is read in this process


def split_input(config: Config, console: Console, piped: PipedInput | None = None) -> SplitInput:
    """Lists the input and measures its size. Raises `ConfigError` if nothing can be read."""
    splits = list_splits(config, console, piped)
    sizes = {split.file_split.file: split.file_split.stamp.size for split in splits}
    small = len(sizes) <= SMALL_FILES and None not in sizes.values() and sum(filter(None, sizes.values())) <= SMALL_BYTES
    small = small and sum(split.file_split.kind == "lance" for split in splits) <= 1  # their files are manifests
    return SplitInput(splits, small)


def list_splits(config: Config, console: Console, piped: PipedInput | None = None) -> list[ReadSplit]:
    """The read tasks, in the order of the input. `piped`: standard input, if it has been read already. Raises `ConfigError`
    for a template that asks the same for each row."""
    dataset = config.dataset
    if dataset.path == STDIN and piped is None:
        piped = receive()
    file_splits = list_file_splits(
        piped.path if piped else dataset.path,
        chunk_bytes=dataset.chunk_bytes,
        on_bad_input=dataset.on_bad_input,
        note=partial(warn, console),
    )
    if dataset.limit is not None or dataset.sample is not None:
        file_splits = _some_rows(file_splits, dataset, console)
    if dataset.template is not None and not (template := Template(dataset.template)).varies and _several(file_splits):
        raise template.without_variable()
    splits = [ReadSplit(number, file_split) for number, file_split in enumerate(file_splits)]
    return piped.named(splits) if piped else splits


def _some_rows(file_splits: Sequence[FileSplit], dataset: DatasetConfig, console: Console) -> list[FileSplit]:
    """The file splits with the rows of `dataset.limit` and `dataset.sample`. Counts the rows, which reads them."""
    counts: list[int] = []
    left = dataset.limit
    for file_split in file_splits:
        counts.append(_count(file_split, dataset.max_row_bytes, left))
        left = None if left is None else left - counts[-1]
    rows: Sequence[int] = range(sum(counts))
    if dataset.sample is not None and dataset.sample < len(rows):
        text = f"A random sample: {dataset.sample:,} of {len(rows):,} rows (dataset.sample_seed={dataset.sample_seed})."
        console.print(text, highlight=False)
        rows = sorted(random.Random(dataset.sample_seed).sample(rows, dataset.sample))
    some: list[FileSplit] = []
    first = at = 0
    for file_split, count in zip(file_splits, counts, strict=True):
        end = bisect_left(rows, first + count, at)
        if end > at:
            take = range(count) if end - at == count else [row - first for row in rows[at:end]]
            some.append(replace(file_split, take=take))
        first, at = first + count, end
    return some or [replace(file_splits[0], take=())]


def _count(file_split: FileSplit, max_row_bytes: int, limit: int | None) -> int:
    """The number of rows, up to `limit`."""
    rows = 0
    if file_split.kind == "lance":
        rows = file_split.stop - file_split.start
        return rows if limit is None else min(rows, limit)
    if file_split.kind == "parquet" and limit is None:
        return parquet_rows(file_split)
    if limit != 0:
        for batch in read_file_split(file_split, max_row_bytes=max_row_bytes):
            rows += len(batch)
            if limit is not None and rows >= limit:
                return limit
    return rows


def _several(file_splits: Sequence[FileSplit]) -> bool:
    """True if there are at least two rows."""
    rows = 0
    for file_split in file_splits:
        rows += len(next(read_file_split(file_split, batch_rows=2), []))
        if rows > 1:
            return True
    return False
