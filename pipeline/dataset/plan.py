"""Splits the input into read tasks."""

from __future__ import annotations

from rich.console import Console

from pipeline.config import Config
from pipeline.dataset.reader import Piece
from pipeline.dataset.source import list_chunks, read_chunk
from pipeline.monitor.console import warn
from pipeline.storage.filesystem import resolve


def list_pieces(config: Config, console: Console) -> list[Piece]:
    """What is to be read, in its order."""
    dataset = config.dataset
    chunks = list_chunks(dataset.path, chunk_bytes=dataset.chunk_bytes, on_bad_input=dataset.on_bad_input)
    if config.output.path:  # inside the dataset's own directory, it must not be its input the next time
        out = resolve(config.output.path)[1] + "/"
        chunks = [chunk for chunk in chunks if not resolve(chunk.file)[1].startswith(out)]
    for chunk in chunks:
        if chunk.kind == "bad":
            warn(console, f"{chunk.name}: {chunk.reason}; it becomes one error row.")
    pieces: list[Piece] = []
    left = dataset.limit
    for chunk in chunks:
        if left is None:
            pieces.append(Piece(len(pieces), chunk))
        elif left > 0:
            rows = 0
            for batch in read_chunk(chunk, max_row_bytes=dataset.max_row_bytes):
                rows += len(batch)
                if rows >= left:
                    break
            pieces.append(Piece(len(pieces), chunk, min(rows, left)))
            left -= min(rows, left)
    return pieces
