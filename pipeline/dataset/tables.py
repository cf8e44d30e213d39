"""Reads Delta Lake and Lance tables as datasets: one version of a table becomes files or ranges of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any
from urllib.parse import parse_qsl, unquote

import pyarrow as pa
import pyarrow.fs as pafs

from engines.errors import ConfigError, ErrorCode
from engines.text import one_line
from pipeline.dataset.file_split import FileSplit
from pipeline.storage.filesystem import GLOB, child, info_of, listing, resolve, split_options

DELTA_LOG, LANCE_VERSIONS = "_delta_log", "_versions"
# Rows of a Lance table that one read task reads.
LANCE_ROWS = 50_000

_DELTA_URI = re.compile(r"delta://(?P<table>.+?)(@(?P<version>\d+))?", re.DOTALL)
# Features of a table that a reader of its data files must know. The files alone would give wrong rows.
_UNREAD = frozenset(("deletionVectors", "columnMapping"))


@dataclass(frozen=True, slots=True)
class Table:
    """A table that `dataset.path` or `output.table` names."""

    kind: str  # "delta" or "lance"
    path: str  # of its directory, for `resolve`
    version: int | None  # None: the newest


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file of a Delta table, with the columns that its directory gives."""

    uri: str
    name: str  # relative to the table
    partition: tuple[tuple[str, pa.Scalar], ...]


def named_table(path: str) -> Table | None:
    """The table that a path names by its form: `delta://…` or `….lance`. Else None."""
    if match := _DELTA_URI.fullmatch(path):
        return Table("delta", match["table"], int(match["version"]) if match["version"] else None)
    return Table("lance", path, None) if split_options(path)[0].rstrip("/").endswith(".lance") else None


def find_table(path: str) -> Table | None:
    """The table at a path: one that its form names, or a directory with the log of a Delta table."""
    if table := named_table(path):
        return table
    if path.startswith("hf://") or GLOB.search(split_options(path)[0]):
        return None
    fs, inner = resolve(path)
    log = info_of(fs, f"{inner}/{DELTA_LOG}")
    return Table("delta", path, None) if log.type == pafs.FileType.Directory else None


def location(path: str) -> tuple[str, dict[str, str]]:
    """The address of a table for its library, and the options of its store, which s3:// paths have after `?`."""
    if "://" not in path:
        return resolve(path)[1], {}
    uri, options = split_options(path)
    given = dict(parse_qsl(options[1:]))
    found = {"aws_region": given["region"]} if "region" in given else {}
    if endpoint := given.get("endpoint_override"):
        found |= {"aws_endpoint": f"{given.get('scheme', 'https')}://{endpoint}", "aws_allow_http": "true"}
    return uri, found


def missing_package(kind: str) -> ConfigError:
    package = {"delta": "deltalake", "lance": "pylance"}[kind]
    text = f"a {kind.capitalize()} table needs the package {package}: pip install 'eagleray[{kind}]'"
    return ConfigError(text, code=ErrorCode.TABLE)


def _unreadable(table: Table, reason: str | Exception) -> ConfigError:
    why = reason if isinstance(reason, str) else one_line(reason)
    text = f"dataset.path: cannot read the {table.kind.capitalize()} table {table.path}: {why}"
    return ConfigError(text, code=ErrorCode.TABLE)


def delta_files(table: Table) -> list[DataFile]:
    """The data files of one version of a Delta table, by path. Raises `ConfigError`."""
    try:
        from deltalake import DeltaTable
    except ImportError:
        raise missing_package("delta") from None
    uri, options = location(table.path)
    try:
        opened = DeltaTable(uri, version=table.version, storage_options=options)
        actions = pa.table(opened.get_add_actions())
        features = _UNREAD & set(opened.protocol().reader_features or ())
        mapped = opened.metadata().configuration.get("delta.columnMapping.mode", "none") != "none"
        deleted = "deletionVectors" in features and pa.table(opened.deletion_vectors()).num_rows
    except Exception as error:  # the library has types of its own
        raise _unreadable(table, error) from None
    if mapped or deleted:
        what = "it has deletion vectors: rewrite its files" if deleted else "it maps the names of columns: copy it"
        raise _unreadable(table, f"{what} (for example, with Spark) and name the result")
    names = [unquote(name) for name in actions["path"].to_pylist()]
    partitions = actions["partition"].combine_chunks() if "partition" in actions.column_names else None
    return [
        DataFile(child(table.path, name), name, _columns(partitions, at))
        for at, name in sorted(enumerate(names), key=itemgetter(1))
    ]


def _columns(partitions: pa.StructArray | None, at: int) -> tuple[tuple[str, pa.Scalar], ...]:
    if partitions is None:
        return ()
    return tuple((field.name, partitions.field(field.name)[at]) for field in partitions.type)


def lance_splits(table: Table, name: str) -> list[FileSplit]:
    """The rows of the newest version of a Lance table, in ranges. `file` is the manifest of the version. Raises
    `ConfigError`."""
    try:
        opened = _open_lance(table.path)
        version, rows = opened.version, opened.count_rows()
        fs, inner = resolve(table.path)
        names = (f"{version}.manifest", f"{(1 << 64) - 1 - version:020}.manifest")
        found = {info.base_name for info in listing(fs, f"{inner}/{LANCE_VERSIONS}")} & set(names)
        file = child(table.path, f"{LANCE_VERSIONS}/{found.pop()}")
    except ConfigError:
        raise
    except Exception as error:
        raise _unreadable(table, error) from None
    starts = range(0, rows, LANCE_ROWS) if rows else (0,)
    return [FileSplit(file, name, "lance", at, min(rows, at + LANCE_ROWS), at) for at in starts]


def _open_lance(path: str, version: int | None = None) -> Any:
    try:
        import lance
    except ImportError:
        raise missing_package("lance") from None
    uri, options = location(path)
    return lance.dataset(uri, version=version, storage_options=options or None)


def _version_of(file_split: FileSplit) -> Any:
    """The version of the Lance table whose manifest the split names."""
    path, _, manifest = split_options(file_split.file)[0].rpartition(f"/{LANCE_VERSIONS}/")
    number = int(manifest.partition(".")[0])
    version = (1 << 64) - 1 - number if number >= 1 << 63 else number
    return _open_lance(path + split_options(file_split.file)[1], version)


def lance_schema(file_split: FileSplit) -> pa.Schema:
    return _version_of(file_split).schema


def lance_batches(file_split: FileSplit, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """The rows of a split, in order."""
    left = file_split.stop - file_split.start
    if left:
        scanner = _version_of(file_split).scanner(
            offset=file_split.start, limit=left, scan_in_order=True, batch_size=batch_rows
        )
        yield from scanner.to_batches()
