"""The plan of the input: the splits that read tasks read. `pipeline/output/plan.py` plans the output."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from pipeline.config import Config
from pipeline.dataset.reader import ReadSplit
from pipeline.dataset.source import list_file_splits, read_file_split
from pipeline.monitor.console import warn
from pipeline.storage.filesystem import info_of, resolve

# An input of up to this many files and bytes is read in one process, because starting others takes seconds.
SMALL_FILES, SMALL_BYTES = 8, 8 << 20


@dataclass(frozen=True, slots=True)
class SplitInput:
    """The whole input, split into read tasks."""

    splits: list[ReadSplit]
    small: bool  # the input is read in this process


def split_input(config: Config, console: Console) -> SplitInput:
    """Lists the input and measures its size. Raises `ConfigError` if nothing can be read."""
    splits = list_splits(config, console)
    few = list(dict.fromkeys(split.file_split.file for split in splits))[: SMALL_FILES + 1]
    small = len(few) <= SMALL_FILES and sum(info_of(*resolve(name)).size for name in few) <= SMALL_BYTES
    return SplitInput(splits, small)


def list_splits(config: Config, console: Console) -> list[ReadSplit]:
    """The read tasks, in the order of the input."""
    dataset = config.dataset
    file_splits = list_file_splits(dataset.path, chunk_bytes=dataset.chunk_bytes, on_bad_input=dataset.on_bad_input)
    for file_split in file_splits:
        if file_split.kind == "bad":
            warn(console, f"{file_split.name}: {file_split.reason}; it becomes one error row.")
    splits: list[ReadSplit] = []
    left = dataset.limit
    for file_split in file_splits:
        if left is None:
            splits.append(ReadSplit(len(splits), file_split))
        elif left > 0:
            rows = 0
            for batch in read_file_split(file_split, max_row_bytes=dataset.max_row_bytes):
                rows += len(batch)
                if rows >= left:
                    break
            splits.append(ReadSplit(len(splits), file_split, min(rows, left)))
            left -= min(rows, left)
    return splits
