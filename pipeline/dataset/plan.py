"""Splits the input into read tasks."""

from __future__ import annotations

from rich.console import Console

from pipeline.config import Config
from pipeline.dataset.reader import ReadSplit
from pipeline.dataset.source import list_file_splits, read_file_split
from pipeline.monitor.console import warn


def list_splits(config: Config, console: Console) -> list[ReadSplit]:
    """What is to be read, in its order."""
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
