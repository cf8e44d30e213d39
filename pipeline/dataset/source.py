"""Finds the input files of `dataset.path`, and divides them into file splits."""

from __future__ import annotations

import contextlib
import itertools
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
from fsspec.utils import glob_translate
from pyarrow import fs as pafs

from engines.errors import ConfigError, ErrorCode, nearest
from engines.text import one_line
from pipeline.dataset.detect import file_splits_of
from pipeline.dataset.file_split import FileSplit, Partition
from pipeline.dataset.tables import DELTA_LOG, Table, delta_files, find_table, lance_splits, named_table
from pipeline.dataset.tree import HIDDEN, Tree, below, once, printable, walk
from pipeline.storage.filesystem import GLOB, FileStamp, is_within, resolve, split_options

OPEN_AT_ONCE = 16
# Names of files that a note lists.
LISTED = 5

_DATA_NAME = re.compile(
    r"\.(?P<kind>jsonl|ndjson|json|csv|tsv)(\.gz|\.zst|\.zstd)?$|\.(?P<typed>parquet|pq|arrow|feather)$", re.IGNORECASE
)
_HIDDEN = re.compile(r"(^|/)[._]")
# Files that describe a dataset of Hugging Face's library and are not part of its rows.
_DESCRIPTIONS = frozenset(("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"))
_HF_KINDS = ("arrow", "parquet")
# A directory `year=2024` gives a column. Spark writes this name for a null.
_PARTITION = re.compile(r"([^=/]+)=([^/]*)")
_NULL = "__HIVE_DEFAULT_PARTITION__"
# Texts that are the same after a conversion to an integer and back. `01` is not.
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


# --- finding ---------------------------------------------------------------------------------------------------------


def list_file_splits(
    path: str | os.PathLike[str] | Sequence[str],
    *,
    chunk_bytes: int = 64 << 20,
    on_bad_input: str = "quarantine",
    note: Callable[[str], object] = lambda text: None,
) -> list[FileSplit]:
    """All file splits of a file, a directory, a glob or a list of them. The order is that of the list, then by path.

    A directory is searched recursively for the names in docs/input.md. Names that begin with "." or "_" are skipped. Named
    files and files that match a glob may have any name. A file that is named twice, or that is also reached through
    symbolic links, is read once. Outputs of Eagleray below a directory or glob are skipped; to read one, name its data
    directory. Large plain JSONL files are read here to count their lines; for a remote file this takes as long as its
    download. `note` is called with sentences about files that are not read.

    Raises `ConfigError` if nothing is found, if no file can be read, or with `on_bad_input="fail"` if any file cannot be
    read. Otherwise an unreadable file becomes a file split of kind "bad".
    """
    paths = [os.fspath(path)] if isinstance(path, (str, os.PathLike)) else [os.fspath(p) for p in path]
    if not paths or not all(paths):
        raise ConfigError("dataset.path is empty", key="dataset.path")
    found: dict[str, _InputFile] = {}
    real: dict[str, str] = {}
    for one in paths:
        for file in _find(one, lambda text: note(printable(text))):
            if real.setdefault(file.real, file.uri) == file.uri:
                found[file.uri] = file
    files = _with_names(_with_integers(list(found.values())))
    with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
        splits = list(pool.map(lambda file: _splits_of(file, chunk_bytes), files))
    file_splits = list(itertools.chain.from_iterable(splits))
    bad = [file_split for file_split in file_splits if file_split.kind == "bad"]
    if bad and (on_bad_input == "fail" or len(bad) == len(files)):
        more = f" (and {len(bad) - 1} more that cannot be read)" if len(bad) > 1 else ""
        raise ConfigError(f"dataset.path: {bad[0].file} is {bad[0].reason}{more}", code=ErrorCode.INPUT_FILES)
    for file_split in bad:
        note(f"{file_split.name} is {file_split.reason}: it becomes one error row.")
    return file_splits


@dataclass(frozen=True, slots=True)
class _InputFile:
    uri: str
    name: str  # relative to the directory or glob; printable
    real: str  # equal for two names of one file
    columns: dict[str, str | None]  # those of its directories
    partition: Partition = ()  # `columns` with their types
    table: Table | None = None  # the Lance table that this file is
    splits: tuple[FileSplit, ...] = ()  # of a Lance table
    stamp: FileStamp | None = None  # if the listing has it
    old_name: str = ""  # the name in earlier versions; empty: the same

    def longer_names(self) -> Iterator[str]:
        """The name, with more and more of the directories above the file, and at last with a number."""
        yield self.name
        path = self.table.path if self.table is not None else self.uri
        parts = printable(_without_query(path)).rpartition("://")[2].strip("/").split("/")
        yield from ("/".join(parts[-count:]) for count in range(self.name.count("/") + 2, len(parts) + 1))
        yield from (f"{self.name} ({number})" for number in itertools.count(2))


def _with_names(files: list[_InputFile]) -> list[_InputFile]:
    """The files with different names. The first file of a name has it; a later one gets directories before it. So a file
    that is added to the end of `dataset.path` changes no other name. Names are parts of keys.

    Earlier versions gave longer names to all files if two were equal.
    """
    taken: dict[str, None] = {}
    for file in files:
        taken[next(name for name in file.longer_names() if name not in taken)] = None
    old_names = [file.old_name or file.name for file in files]
    if len(set(old_names)) < len(files):
        common = os.path.commonprefix([file.uri for file in files]).rpartition("/")[0]  # noqa: RUF071 -- URIs and paths
        old_names = [file.name if file.table else file.uri[len(common) :].lstrip("/") for file in files]
    named = zip(files, taken, old_names, strict=True)
    # The old name of one file may be the name of another: then its rows must not get that file's answers.
    return [replace(file, name=name, old_name="" if old in taken else old) for file, name, old in named]


def _without_query(path: str) -> str:
    """A path or URL without the query of a URL. The name of a file may have a `?`."""
    return split_options(path)[0] if "://" in path else path


def _splits_of(file: _InputFile, chunk_bytes: int) -> list[FileSplit]:
    if printable(file.uri) != file.uri:
        return [_badly_named(file)]
    stamp = file.stamp or FileStamp()
    if file.stamp is None:
        with contextlib.suppress(Exception):  # of the store's own types; `file_splits_of` reports the reason
            stamp = FileStamp.of(file.uri)
    splits = list(file.splits) or file_splits_of(file.uri, file.name, chunk_bytes)
    name, old_name, partition = file.name, file.old_name, file.partition
    return [replace(split, name=name, old_name=old_name, partition=partition, stamp=stamp) for split in splits]


def _badly_named(file: _InputFile) -> FileSplit:
    """The split of a file on a disk whose path is not UTF-8. Arrow cannot open it."""
    stamp = FileStamp()
    with contextlib.suppress(OSError):
        stat = Path(file.uri).stat()
        stamp = FileStamp(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    reason = "not readable, because its name is not UTF-8: rename it"
    return FileSplit(printable(file.uri), file.name, "bad", 0, 0, 0, reason, stamp=stamp)


def _columns(directories: str) -> dict[str, str | None]:
    """The columns that directories named `year=2024` give. Of equal names, the innermost counts."""
    found = (_PARTITION.fullmatch(part) for part in directories.split("/"))
    columns = {unquote(match[1]): unquote(match[2]) for match in found if match}
    return {name: None if value == _NULL else value for name, value in columns.items()}


def _with_integers(files: list[_InputFile]) -> list[_InputFile]:
    """The files with typed columns. A column is an integer if each of its values is one that is written in the usual way;
    otherwise it is text."""
    values: dict[str, set[str]] = {}
    for file in files:
        for name, value in file.columns.items():
            values.setdefault(name, set()).update(() if value is None else (value,))
    integers = {name for name, found in values.items() if found and all(map(_INTEGER.fullmatch, found))}

    def scalar(name: str, value: str | None) -> pa.Scalar:
        is_integer = name in integers
        return pa.scalar(int(value) if is_integer and value else value, pa.int64() if is_integer else pa.string())

    def typed(file: _InputFile) -> Partition:
        return tuple((name, scalar(name, value)) for name, value in file.columns.items())

    return [replace(file, partition=typed(file)) if file.columns else file for file in files]


def _partition_above(path: str) -> str:
    """The directories named `year=2024` at the end of a path, without a gap."""
    parts = path.rstrip("/").split("/")
    return "/".join(reversed(list(itertools.takewhile(_PARTITION.fullmatch, reversed(parts)))))


def _table_files(table: Table) -> list[_InputFile]:
    """The files of a table. A Lance table is one file of several splits."""
    if table.kind == "lance":
        splits = lance_splits(table, posixpath.basename(split_options(table.path)[0].rstrip("/")))
        name, uri = printable(splits[0].name), splits[0].file
        return [_InputFile(uri, name, uri, {}, table=table, splits=tuple(splits))]
    return [_InputFile(file.uri, printable(file.name), file.uri, {}, file.partition) for file in delta_files(table)]


def _find(path: str, note: Callable[[str], object]) -> list[_InputFile]:
    """The files of one entry of `dataset.path`. Raises `ConfigError` if there is none."""
    if table := named_table(path):
        return _table_files(table)
    fs, inner = resolve(path)
    local = isinstance(fs, pafs.LocalFileSystem)
    base, options = (inner, "") if local else split_options(path)
    try:
        info = fs.get_file_info(inner)
        kind = info.type
        if kind == pafs.FileType.File:  # its name may contain glob characters
            # The query of a signed URL is another one each time, and a secret.
            directory, _, name = printable(_without_query(inner)).rpartition("/")
            real = os.path.realpath(inner) if local else f"{fs.type_name}:{inner}"
            columns, stamp = _columns(_partition_above(directory)), FileStamp.from_info(fs, info)
            old = inner.rpartition("/")[2]
            return [_InputFile(base + options, name, real, columns, stamp=stamp, old_name="" if local else old)]
        if kind == pafs.FileType.Directory:
            if table := find_table(path):
                return _table_files(table)
            root, name = inner, ""
            tree, wrong = _below(fs, inner), "there is no data file in"
        elif glob := GLOB.search(base):
            base = base[: base.rfind("/", 0, glob.start()) + 1]
            root = resolve(base + options)[1]
            name = _relative(inner, root)
            tree, wrong = _matching(fs, root, inner), "nothing matches"
        else:
            root, _, name = inner.rpartition("/")
            tree, wrong = Tree(), "there is no file or directory"
        if not tree.entries:
            _check_hub(path)
            if tree.outputs:
                output = f"{root}/{tree.outputs[0]}".rstrip("/")
                wrong = f"{output} is an output of Eagleray's, which is read only where {output}/data is named: {wrong}"
            there = fs.get_file_info(pafs.FileSelector(root or "/", allow_not_found=True))
            hint = nearest(name, [info.base_name for info in there]) if there else ""
            raise ConfigError(f"dataset.path: {wrong} '{path}'{hint}", code=ErrorCode.INPUT_FILES)
    except ConfigError:
        raise
    except Exception as error:  # each store raises its own types, for example without a network
        _check_hub(path)
        raise ConfigError(f"dataset.path: cannot read '{path}': {one_line(error)}", code=ErrorCode.INPUT_FILES) from None
    _note(tree, path, note)
    above = _partition_above(printable(root))
    return [
        _InputFile(
            f"{base.removesuffix('/')}/{entry.name}{options}",
            name := printable(entry.name),
            entry.real,
            _columns(f"{above}/{posixpath.dirname(name)}"),
            stamp=entry.stamp,
        )
        for entry in once(tree.entries)
    ]


def _check_hub(path: str) -> None:
    """Raises `ConfigError` with the reason if the path is that of a dataset that the Hugging Face Hub does not show."""
    if path.startswith("hf://"):
        from pipeline.dataset.hub import missing_dataset

        if reason := missing_dataset(path):
            raise ConfigError(f"dataset.path: cannot read '{path}': {reason}", code=ErrorCode.INPUT_FILES) from None


def _note(tree: Tree, path: str, note: Callable[[str], object]) -> None:
    """Says which files and outputs a directory or glob skips, and that it has files of several kinds."""
    for reason, names in tree.skipped.items():
        note(f"{path}: these names are not read, because {reason}: {_first(names)}.")
    if tree.outputs:
        note(f"{path}: these outputs of Eagleray are not read: {_first(tree.outputs)}.")
    kinds = Counter(_kind_of(entry.name) for entry in tree.entries)
    if len(kinds) > 1:
        counts = ", ".join(f"{count:,} .{kind}" for kind, count in kinds.most_common())
        note(f"{path} has files of several kinds ({counts}): all are read. A glob such as *.jsonl reads one kind.")


def _first(names: list[str]) -> str:
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}"


def _kind_of(name: str) -> str:
    match = _DATA_NAME.search(name)
    return (match["kind"] or match["typed"]).lower() if match else name.rpartition(".")[2]


def _relative(path: str, root: str) -> str:
    return path.removeprefix(root).lstrip("/")


def _below(fs: pafs.FileSystem, directory: str) -> Tree:
    """The data files in a directory."""
    tree = walk(fs, directory)
    for name in tree.skipped.get(HIDDEN, ()):  # its removed files would be read as well
        if posixpath.basename(name) == DELTA_LOG:
            inside = f"{directory}/{posixpath.dirname(name)}".rstrip("/")
            raise ConfigError(f"dataset.path: {inside} is a Delta table: name it by itself", code=ErrorCode.TABLE)
    files = [entry for entry in once(tree.entries) if entry.is_file and not _HIDDEN.search(entry.name)]
    tree.entries = [entry for entry in files if _DATA_NAME.search(entry.name)]
    tree.skip("they have no ending of a data file", (e.name for e in files if not _DATA_NAME.search(e.name)))
    if any(_kind_of(entry.name) in _HF_KINDS for entry in tree.entries):
        described = [entry for entry in tree.entries if posixpath.basename(entry.name) in _DESCRIPTIONS]
        tree.skip("they describe a dataset of Hugging Face", (entry.name for entry in described))
        tree.entries = [entry for entry in tree.entries if entry not in described]
    return tree


def _matching(fs: pafs.FileSystem, root: str, pattern: str) -> Tree:
    """The files that a glob matches. `root` is the directory above its first special character."""
    regex = re.compile(glob_translate(pattern))
    parts = _relative(pattern, root).split("/")
    below_hidden, deep = _HIDDEN.search("/".join(parts)), any("**" in part for part in parts)

    def wanted(name: str) -> bool:
        """True if the pattern names this directory, as `runs/*/data` names the data directories of outputs. `**` names
        none."""
        depth = name.count("/")
        return not deep and depth < len(parts) and name.endswith(f"/{parts[depth]}")

    there = fs.get_file_info(root or "/").type != pafs.FileType.NotFound
    levels = None if deep else len(parts)
    tree = walk(fs, root, levels=levels, hidden=True, wanted=wanted) if there else Tree()
    found = Tree()
    for entry in tree.entries:
        # A pattern such as "_parts/*" asks for hidden names, which are skipped otherwise.
        if not regex.match(f"{root}/{entry.name}") or (_HIDDEN.search(entry.name) and not below_hidden):
            continue
        if entry.is_file:
            found.entries.append(entry)
        elif not deep:  # "2024-*" may match directories; the files in them are read. "**" already matches the files.
            inside = _below(fs, f"{root}/{entry.name}")
            found.entries += below(entry, inside.entries)
            for reason, names in inside.skipped.items():
                found.skip(reason, (f"{entry.name}/{name}" for name in names))
    # The pattern may name files in an output, as `runs/*/data` does.
    found.outputs = [output for output in tree.outputs if not any(is_within(e.name, output) for e in found.entries)]
    return found
