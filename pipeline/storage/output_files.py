"""The files that Eagleray writes into an output directory: their names, and how to recognize each as Eagleray's own.

A name is proof only if no other program would choose it (`w1-0123456789ab.parquet` in `_segments/`). Otherwise the
content decides: a user's own `manifest.json` is not ours.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engines.errors import ConfigError
from engines.text import one_line
from pipeline.storage.filesystem import TEMPORARY, info_of, listing, write_atomic
from pipeline.storage.retry import patiently

# Files in the root of the output. `MARKER` is written first, `MANIFEST` last.
MARKER, FILES, MANIFEST, REPORT = "_eagleray.json", "_files.json", "manifest.json", "report.html"
STATE, BUDGET = "_run.json", "_budget.json"
# Directories below the root, and the lock file in `SEGMENTS`.
DATA, ERRORS, SEGMENTS, BATCHES = "data", "errors", "_segments", "_batches"
DATASET, INPUT, TABLE = "_dataset", "_input", "_table"  # the rows of a program, and those of standard input
LOCK = ".lock"
# Names of claims begin with this; 32 hexadecimal digits follow.
CLAIM = "_lock-"

_SEGMENT = re.compile(r"\w[\w.-]*-[0-9a-f]{12}\.parquet")
_CLAIM = re.compile(CLAIM + r"[0-9a-f]{32}\.json")
_BATCH = re.compile(r"eagleray-[0-9a-f]{8}-\d{5,}\.(json|jsonl|parquet)")
_ROWS = re.compile(DATASET + r"/[0-9a-f]{32}/rows\.(jsonl|parquet)")
_TABLE_FILE = re.compile(r"[0-9a-f]{16}(\.json|-\d{5,}\.keys)")
_KEPT_INPUT = re.compile(r"stdin-[0-9a-f]{16}\.(jsonl|csv|parquet|arrow)")
_PART = re.compile(r"part-\d{5,}\.(parquet|jsonl)")

# The JSON keys that every version has written.
_KEYS = {
    MARKER: {"format", "eagleray", "dataset", "output"},
    FILES: {"eagleray_files"},
    MANIFEST: {"status", "rows", "engine", "ledger", "files", "versions", "config"},
    STATE: {"phase", "pid", "host", "started_at", "beat_at", "status", "config"},
    BUDGET: {"usd"},
}
_BATCH_KEYS = {"name", "model", "round", "settings", "rows", "state"}
_SEGMENT_COLUMNS = {"key", "id", "response", "finish_reason", "error", "done_at"}
# The columns of parts: for data/, in each output.style.
_PART_COLUMNS = {
    DATA: (
        {"id", "index", "response", "messages", "finish_reason", "error"},
        {"id", "custom_id", "response", "error"},  # openai_batch
        {"conversation_id", "messages", "metadata"},  # oumi
    ),
    ERRORS: ({"error"},),
}
# At most so many bytes of a JSONL part are read, to find its first line.
_HEAD_BYTES = 1 << 20
# Up to this many segments and batch files are opened to find one that can be read.
_TRIES = 3


def is_segment(name: str) -> bool:
    """True if a file of this name in `_segments/` is a segment of the ledger."""
    return _SEGMENT.fullmatch(name) is not None


def is_claim(name: str) -> bool:
    """True if a file of this name in `_segments/` is a run's claim to the output."""
    return _CLAIM.fullmatch(name) is not None


def is_batch_file(name: str) -> bool:
    """True if a file of this name in `_batches/` belongs to a batch."""
    return _BATCH.fullmatch(name) is not None


def dataset_file(digest: str, kind: str) -> str:
    """The path below the output of the rows that a program gave to the run. `kind`: jsonl or parquet."""
    return f"{DATASET}/{digest[:32]}/rows.{kind}"


def is_dataset_file(path: str) -> bool:
    """True if this path below the output is that of rows that a program gave."""
    return _ROWS.fullmatch(path) is not None


def is_kept_input(name: str) -> bool:
    """True if a file of this name in `_input/` is a copy of standard input."""
    return _KEPT_INPUT.fullmatch(name) is not None


def keep_rows(fs: pafs.FileSystem, target: str, source: Path) -> bool:
    """Copies a file of given rows into the output. Returns False if it is there already: its path has a digest of the rows.
    Raises `ConfigError` if it cannot be written."""
    there = info_of(fs, target)
    if there.is_file and there.size == source.stat().st_size:
        return False
    try:
        write_atomic(fs, target, source)
    except OSError as error:
        text = f"output.path: cannot write {target}: {error.strerror or one_line(error)}"
        raise ConfigError(text, key="output.path") from None
    return True


def drop_directories(fs: pafs.FileSystem, file: str) -> None:
    """Removes the empty directories of given rows above a removed file. A store has no directories."""
    if isinstance(fs, pafs.LocalFileSystem):
        for folder in list(Path(file).parents)[:2]:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def is_table_file(name: str) -> bool:
    """True if a file of this name in `_table/` says which rows were appended to a table."""
    return _TABLE_FILE.fullmatch(name) is not None


def is_temporary(name: str) -> bool:
    """True if a file of this name is the temporary file of a killed writer."""
    return TEMPORARY.fullmatch(name) is not None


def is_own_key(key: str, parts: Collection[str]) -> bool:
    """True if Eagleray writes this path below the output. `parts` are the paths of its parts in data/ and errors/."""
    folder, _, name = key.rpartition("/")
    if is_dataset_file(key):
        return True
    if not folder:
        return key in (*_KEYS, REPORT)
    checks = {
        SEGMENTS: lambda: is_segment(name) or is_claim(name),
        BATCHES: lambda: is_batch_file(name),
        INPUT: lambda: is_kept_input(name),
        TABLE: lambda: is_table_file(name),
    }
    return checks[folder]() if folder in checks else key in parts


def read_json(fs: pafs.FileSystem, path: str) -> dict[str, Any] | None:
    """The JSON object in a file. None if the file does not exist or holds anything else."""

    def read() -> bytes:
        with fs.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())

    try:
        found = orjson.loads(patiently(read))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_own(fs: pafs.FileSystem, root: str, name: str) -> dict[str, Any] | None:
    """Reads `MARKER`, `FILES`, `MANIFEST`, `STATE` or `BUDGET` of an output. None if it is absent or not Eagleray's."""
    found = read_json(fs, f"{root}/{name}")
    if found is None or not _KEYS[name] <= found.keys():
        return None
    if name == MARKER and not (isinstance(found["format"], int) and isinstance(found["dataset"], (str, list))):
        return None
    versions = found.get("versions")
    if name == MANIFEST and not (isinstance(versions, Mapping) and "eagleray" in versions and _is_files(found["files"])):
        return None
    if name == FILES and not isinstance(found["eagleray_files"], list):
        return None
    return found


def _is_files(files: Any) -> bool:
    return isinstance(files, Mapping) and all(path.split("/")[0] in (DATA, ERRORS) for path in files)


def is_output(fs: pafs.FileSystem, root: str, names: Collection[str]) -> bool:
    """True if the directory with these `names` is an output of Eagleray: of this version, or of one before the marker."""
    if MARKER in names and read_own(fs, root, MARKER):
        return True
    likely = SEGMENTS in names or BATCHES in names or {MANIFEST, REPORT} <= set(names)
    return likely and is_old_output(fs, root, names)


def is_old_output(fs: pafs.FileSystem, root: str, names: Collection[str]) -> bool:
    """True if the directory with these `names` is the output of a version that wrote no marker."""
    if any(name in names and read_own(fs, root, name) for name in (MANIFEST, STATE)):
        return True
    if SEGMENTS in names:
        found = _files(fs, f"{root}/{SEGMENTS}")
        segments = [name for name in found if is_segment(name)]
        if any(_is_ledger(fs, f"{root}/{SEGMENTS}/{name}") for name in segments[:_TRIES]):
            return True
        # A run was killed before it wrote anything else, or another run has just begun.
        if set(names) == {SEGMENTS} and found and all(name == LOCK or is_claim(name) for name in found):
            return True
    if BATCHES in names:
        files = [name for name in _files(fs, f"{root}/{BATCHES}") if is_batch_file(name) and name.endswith(".json")]
        return any(_is_batch(fs, f"{root}/{BATCHES}/{name}") for name in files[:_TRIES])
    return False


def old_parts(fs: pafs.FileSystem, root: str) -> set[str]:
    """The parts and the report of an output without marker and manifest, recognized by content. A run that was killed near
    its end leaves these."""
    found = set()
    for folder in (DATA, ERRORS):
        for name in _files(fs, f"{root}/{folder}"):
            if _PART.fullmatch(name) and _is_part(fs, folder, f"{root}/{folder}/{name}"):
                found.add(f"{folder}/{name}")
    if b"Eagleray</title>" in _head(fs, f"{root}/{REPORT}"):
        found.add(REPORT)
    return found


def _head(fs: pafs.FileSystem, path: str) -> bytes:
    try:
        with fs.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read(_HEAD_BYTES))
    except OSError:
        return b""


def _files(fs: pafs.FileSystem, directory: str) -> list[str]:
    try:
        return sorted(info.base_name for info in listing(fs, directory) if info.is_file)
    except NotADirectoryError:
        return []


def _is_ledger(fs: pafs.FileSystem, path: str) -> bool:
    schema = _schema(fs, path)
    return schema is not None and set(schema.names) >= _SEGMENT_COLUMNS and schema.field("key").type == pa.binary(32)


def _is_batch(fs: pafs.FileSystem, path: str) -> bool:
    found = read_json(fs, path) or {}
    return found.keys() >= _BATCH_KEYS and path.endswith(f"/{found['name']}.json")


def _is_part(fs: pafs.FileSystem, folder: str, path: str) -> bool:
    """True if a file with the name of a part has the columns of one. A JSON line that is too long to read is accepted,
    because the name is that of a part and the directory is an output."""
    if path.endswith(".parquet"):
        schema = _schema(fs, path)
        columns = set(schema.names) if schema is not None else set()
    else:
        head = _head(fs, path)
        first, newline, _ = head.partition(b"\n")
        if not newline and len(head) == _HEAD_BYTES:
            return head.startswith(b"{")
        try:
            found = orjson.loads(first)
        except ValueError:
            return False
        columns = set(found) if isinstance(found, dict) else set()
    return any(known <= columns for known in _PART_COLUMNS[folder])


def _schema(fs: pafs.FileSystem, path: str) -> pa.Schema | None:
    try:
        with fs.open_input_file(path) as file:
            return pq.ParquetFile(file).schema_arrow
    except (OSError, pa.ArrowException):
        return None
