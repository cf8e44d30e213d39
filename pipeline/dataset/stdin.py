"""Standard input as a dataset (`dataset.path=-`): a temporary file, and the copy that the output keeps of it.

The copy lets a later run continue without the pipe. Its name has a digest of its content.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.fs as pafs

from engines.errors import ConfigError, ErrorCode
from pipeline.dataset.arrow_rows import is_arrow
from pipeline.dataset.reader import ReadSplit
from pipeline.dataset.text_stream import READ_ERRORS, open_text, read_head
from pipeline.storage.filesystem import FileStamp, child, listing, remove
from pipeline.storage.output_files import INPUT, is_kept_input, keep_rows

# The value of `dataset.path` that means standard input.
STDIN = "-"
# The name of the input in places (`stdin:7`) is this one with the ending of its kind.
NAME = "stdin"

_BLOCK = 1 << 20
_HEAD = 16 << 10


@dataclass(frozen=True, slots=True)
class PipedInput:
    """The rows of standard input."""

    path: str  # of the temporary file, or of the copy in the output
    kept: str  # the name of the copy
    is_kept: bool  # `path` is the copy in the output

    @property
    def place(self) -> str:
        """The name of this dataset in the marker of an output."""
        return f"{NAME}:{Path(self.kept).stem.removeprefix(NAME + '-')}"

    def named(self, splits: Sequence[ReadSplit]) -> list[ReadSplit]:
        """The splits of `path`, with the name that their rows have in every run."""
        name = f"{NAME}{Path(self.kept).suffix}"
        return [replace(split, file_split=replace(split.file_split, name=name)) for split in splits]

    def keep(self, fs: pafs.FileSystem, root: str, output: str, splits: Sequence[ReadSplit]) -> list[ReadSplit]:
        """Copies the temporary file into the output, and returns the splits of the copy. Copies of other input are removed.
        The caller holds the lock of the output."""
        if self.is_kept:
            return list(splits)
        keep_rows(fs, f"{root}/{INPUT}/{self.kept}", Path(self.path))
        for info in listing(fs, f"{root}/{INPUT}"):
            if is_kept_input(info.base_name) and info.base_name != self.kept:
                remove(fs, info.path)
        uri = child(child(output, INPUT), self.kept)
        shutil.rmtree(Path(self.path).parent)
        stamp = FileStamp.of(uri)
        return [replace(split, file_split=replace(split.file_split, file=uri, stamp=stamp)) for split in splits]


def kept_input(fs: pafs.FileSystem, root: str, output: str) -> PipedInput | None:
    """The copy of standard input in an output."""
    kept = next((name for info in listing(fs, f"{root}/{INPUT}") if is_kept_input(name := info.base_name)), None)
    return PipedInput(child(child(output, INPUT), kept), kept, True) if kept else None


def receive(fs: pafs.FileSystem | None = None, root: str = "", output: str = "") -> PipedInput:
    """Reads standard input to its end, into a temporary file. If nothing arrives, takes the copy that an earlier run has
    kept in the output. Raises `ConfigError` if standard input is a terminal and there is no copy."""
    copy = kept_input(fs, root, output) if fs is not None else None
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        if copy is None:
            text = "dataset.path=-: standard input is a terminal: send rows to it, for example with eagleray … < in.jsonl"
            raise ConfigError(text, code=ErrorCode.INPUT_FILES)
        return copy
    folder = tempfile.mkdtemp(prefix="eagleray-stdin-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path, digest = Path(folder, NAME), hashlib.sha256()
    try:
        with path.open("wb") as file:
            while block := sys.stdin.buffer.read(_BLOCK):
                digest.update(block)
                file.write(block)
            size = file.tell()
    except OSError as error:
        raise ConfigError(
            f"dataset.path=-: cannot read standard input: {error.strerror}", code=ErrorCode.INPUT_FILES
        ) from None
    if not size and copy is not None:
        return copy
    kind = _ending(str(path))
    path = path.rename(path.with_suffix(kind))
    return PipedInput(str(path), f"{NAME}-{digest.hexdigest()[:16]}{kind}", False)


def _ending(path: str) -> str:
    """The ending of a file with this content. Text that does not begin as JSON is CSV."""
    with Path(path).open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PAR1"):
        return ".parquet"
    if is_arrow(head):
        return ".arrow"
    try:
        with open_text(os.path.abspath(path)) as stream:
            text = read_head(stream, _HEAD).lstrip()
    except READ_ERRORS:  # damaged: the reader says so
        text = b""
    return ".jsonl" if not text or text[:1] in (b"{", b"[") else ".csv"
