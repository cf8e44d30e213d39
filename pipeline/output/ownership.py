"""Determines which output directories, and which files in them, belong to Eagleray. All other files stay untouched.

`_eagleray.json`, the marker, is the first file in an output directory. A run writes it only into an absent or empty
directory. It names the dataset. A run refuses a directory that is not empty and has no marker. The exception is an output
of an earlier version, which wrote no marker: the directory gets one.

The manifest names Eagleray's files in data/ and errors/; if there is a manifest, report.html is Eagleray's too. Without a
manifest, `_files.json` names these files; it is written before the first of them. So a run may be killed at any point:
    marker -> segments -> _files.json (old and intended names) -> no manifest -> parts -> manifest -> _files.json
"""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson
import pyarrow.fs as pafs

from engines.errors import ConfigError, ErrorCode
from engines.text import one_line
from pipeline.config import Config
from pipeline.dataset.stdin import STDIN, PipedInput
from pipeline.storage.filesystem import (
    canonical_place,
    info_of,
    is_within,
    listing,
    remove,
    split_glob,
    write_atomic,
    write_if_absent,
)
from pipeline.storage.output_files import (
    BATCHES,
    BUDGET,
    DATA,
    DATASET,
    ERRORS,
    FILES,
    INPUT,
    LOCK,
    MANIFEST,
    MARKER,
    REPORT,
    SEGMENTS,
    STATE,
    drop_directories,
    is_batch_file,
    is_dataset_file,
    is_old_output,
    is_own_key,
    is_segment,
    is_temporary,
    old_parts,
    read_own,
)
from pipeline.storage.retry import patiently

FORMAT = 1
NEW, OLD, OWN = "new", "old", "own"  # states of a directory: absent or empty; of a version without markers; with a marker
_SHOWN = 3
# Ray copies the working directory of a submitted job into a directory of such a name.
_JOB_COPY = re.compile(r"^/(?:.*/)?_ray_pkg_[0-9a-f]+(?:/|$)")
Write = Callable[[pafs.FileSystem, str, bytes], None]


def dataset_places(path: Any, piped: PipedInput | None = None) -> list[str]:
    """The canonical places of `dataset.path`, without duplicates. A place in Ray's copy of a job's working directory is
    relative to that copy, because a job that is submitted again gets another one. The place of standard input is the digest
    of its content."""
    if path == STDIN:
        return [piped.place] if piped else []
    paths = path if isinstance(path, list) else [path]
    return list(dict.fromkeys(_JOB_COPY.sub("ray-working-dir://", canonical_place(one)) for one in paths))


def same_dataset(before: Sequence[str], output_before: str, now: Sequence[str], output_now: str) -> bool:
    """True if the dataset is the same as in an earlier run. The list may have more entries now. Dataset and output may have
    moved together."""
    if set(before) <= set(now):
        return True
    return {_relative(place, output_before) for place in before} <= {_relative(place, output_now) for place in now}


def _without_query(place: str) -> str:
    """A place of a marker. Earlier versions left some queries at the ends of URLs."""
    return canonical_place(place) if place.startswith(("http://", "https://")) else place


def _relative(place: str, output: str) -> str:
    scheme, _, _ = place.partition("://")
    if "://" in place or "://" in output:
        same = "://" in place and output.startswith(f"{scheme}://")
        return posixpath.relpath(place, output) if same else place
    return posixpath.relpath(place, output)


def same_typed(before: Sequence[str], now: Sequence[str]) -> bool:
    """As `same_dataset`, for an earlier version, which wrote paths as they were typed. The working directory of a relative
    path is not known."""
    return all(any(_may_match(old, place) for place in now) for old in before)


def _may_match(typed: str, place: str) -> bool:
    if "://" in typed or Path(typed).expanduser().is_absolute():
        return canonical_place(typed) == place
    tail = re.sub(r"^(\.{1,2}(/|$))+", "", posixpath.normpath(typed))
    return not tail or place.endswith(f"/{tail}")


def check_inputs(dataset: Any, output: str) -> None:
    """Raises `ConfigError` if an entry of `dataset.path` is the output directory or lies inside it.
    The rows that a program gives do lie there."""
    if dataset == STDIN:
        return
    there = canonical_place(output)
    for path in dataset if isinstance(dataset, list) else [dataset]:
        place, _ = split_glob(path)
        if is_within(place, there) and not is_dataset_file(posixpath.relpath(place, there)):
            where = "is that directory" if place == there else "lies inside it"
            raise ConfigError(
                f"output.path={output} would hold its own input: dataset.path={path} {where}; choose another output.path, "
                "which may lie below the dataset's directory",
                code=ErrorCode.INPUT_IN_OUTPUT,
            )


@dataclass
class Ownership:
    """The files of one output directory that are Eagleray's. Make it with `look`."""

    fs: pafs.FileSystem
    root: str
    state: str  # NEW, OLD or OWN
    dataset: list[str]  # of this run, from `dataset_places`
    output: str  # the root's canonical place
    marked: dict[str, Any] = field(default_factory=dict)  # the content of the marker
    files: set[str] = field(default_factory=set)  # Eagleray's files in data/ and errors/, and report.html
    # Parts of earlier runs, also those that a killed run never completed: a store may hold a piece of their upload.
    intended_before: set[str] = field(default_factory=set)

    @classmethod
    def look(cls, config: Config, fs: pafs.FileSystem, root: str, piped: PipedInput | None = None) -> Ownership:
        """Examines the directory and changes nothing. Raises `ConfigError` if a run must not write into it. `piped`:
        standard input, if it is the dataset and has been read."""
        dataset, output = config.dataset.path, str(config.output.path)
        check_inputs(dataset, output)
        own = cls(fs, root, NEW, dataset_places(dataset, piped), canonical_place(output))
        try:
            names = own._names()
            own._find_state(names)
            own._find_files()
            if own.state != NEW:
                own._check_names(names, config.output.format)
                own._check_dataset(names, config)
        except OSError as error:
            raise ConfigError(f"output.path: cannot read {root}: {one_line(error)}", key="output.path") from None
        return own

    def _names(self) -> set[str]:
        if info_of(self.fs, self.root).type == pafs.FileType.File:
            raise ConfigError(f"output.path: cannot write into {self.root}: it is not a directory", key="output.path")
        # A run that is killed while it writes the marker leaves a temporary file.
        return {info.base_name for info in listing(self.fs, self.root) if not is_temporary(info.base_name)}

    def _find_state(self, names: Collection[str]) -> None:
        self.marked = read_own(self.fs, self.root, MARKER) or {} if MARKER in names else {}
        if self.marked:
            self.state = OWN
            if self.marked["format"] > FORMAT:
                raise ConfigError(
                    f"output.path: {self.root} was written by a newer Eagleray ({self.marked['eagleray']})",
                    key="output.path",
                )
        elif names and not self._only_dataset_files(names):
            if not is_old_output(self.fs, self.root, names):
                shown = ", ".join(sorted(names)[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
                raise ConfigError(
                    f"output.path: {self.root} is not empty, and is not an output of Eagleray (it contains {shown}): "
                    "choose a new or empty directory",
                    code=ErrorCode.OUTPUT_NOT_OURS,
                )
            self.state = OLD

    def _only_dataset_files(self, names: Collection[str]) -> bool:
        """True if a program gave rows to a run that has not begun yet."""
        found = self._dataset_files() if set(names) == {DATASET} else [""]
        return all(map(is_dataset_file, found))

    def _dataset_files(self) -> list[str]:
        """The paths, below the root, of all files in the directory of given rows."""
        chosen = pafs.FileSelector(f"{self.root}/{DATASET}", recursive=True, allow_not_found=True)
        infos = patiently(lambda: self.fs.get_file_info(chosen))
        return [info.path[len(self.root) + 1 :] for info in infos if info.is_file and not is_temporary(info.base_name)]

    def _find_files(self) -> None:
        if self.state == NEW:
            return
        if manifest := read_own(self.fs, self.root, MANIFEST):
            self.files = {*manifest["files"], REPORT}
        elif record := read_own(self.fs, self.root, FILES):
            self.files = set(record["eagleray_files"])
        elif self.state == OLD:
            self.files = old_parts(self.fs, self.root)

    def _check_names(self, names: Collection[str], form: str) -> None:
        """Raises `ConfigError` if a run would overwrite a file that is not Eagleray's."""
        # BUDGET is not checked here: a user would move it away, and the money spent would be forgotten. `read_spent`
        # refuses a damaged one.
        foreign = [n for n in (MARKER, MANIFEST, STATE, FILES) if n in names and not read_own(self.fs, self.root, n)]
        foreign += [REPORT] if REPORT in names and REPORT not in self.files else []
        folders = [name for name in (DATA, ERRORS, SEGMENTS, BATCHES, DATASET, INPUT) if name in names]
        foreign += [name for name in folders if info_of(self.fs, f"{self.root}/{name}").is_file]
        first = [f"{folder}/part-00000.{form}" for folder in folders if folder in (DATA, ERRORS)]
        foreign += [name for name in first if name not in self.files and self._is_there(name)]
        if isinstance(self.fs, pafs.LocalFileSystem):
            lock = Path(self.root, SEGMENTS, LOCK)  # Eagleray's own is an empty file
            if lock.is_symlink() or (lock.exists() and lock.stat().st_size):
                foreign.append(f"{SEGMENTS}/{LOCK}")
        if foreign:
            text = f"output.path: {self.in_the_way(foreign)}, or choose another output.path"
            raise ConfigError(text, code=ErrorCode.FILE_IN_THE_WAY)

    def _is_there(self, name: str) -> bool:
        return bool(info_of(self.fs, f"{self.root}/{name}").type != pafs.FileType.NotFound)

    def in_the_way(self, names: Sequence[str]) -> str:
        """The message about files that a run would overwrite."""
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        return f"{self.root}/{names[0]}{more} was not written by Eagleray and would be overwritten: move it away"

    def _check_dataset(self, names: Collection[str], config: Config) -> None:
        if self.state == OWN:
            before = self.marked["dataset"]
            before = [_without_query(place) for place in (before if isinstance(before, list) else [before])]
            same = same_dataset(before, str(self.marked["output"]), self.dataset, self.output)
        else:
            before = self._typed_dataset()
            same = same_typed(before, self.dataset)
        if same or not self.dataset or config.output.overwrite or not self._holds_answers(names):
            return
        raise ConfigError(
            f"output.path: {self.root} holds the answers to another dataset ({self._described(before)}): choose another "
            "output.path, or replace that output with output.overwrite=true",
            code=ErrorCode.OTHER_DATASET,
        )

    def _described(self, dataset: Sequence[str]) -> str:
        inside = all(is_dataset_file(posixpath.relpath(place, str(self.marked.get("output", "")))) for place in dataset)
        return "other rows that a program gave" if dataset and inside else ", ".join(dataset)[:300]

    def _typed_dataset(self) -> list[str]:
        """The dataset of an output without a marker, as it was typed. Empty if it is not known."""
        found = read_own(self.fs, self.root, STATE) or read_own(self.fs, self.root, MANIFEST) or {}
        path = (found.get("config") or {}).get("dataset", {}).get("path") or []
        return [str(one) for one in (path if isinstance(path, list) else [path])]

    def _holds_answers(self, names: Collection[str]) -> bool:
        if MANIFEST in names or self.files:
            return True
        batches = SEGMENTS in names and any(is_segment(name) for name in self._listed(SEGMENTS))
        return batches or (BATCHES in names and any(is_batch_file(name) for name in self._listed(BATCHES)))

    def _listed(self, folder: str) -> list[str]:
        return [info.base_name for info in listing(self.fs, f"{self.root}/{folder}")]

    # -- changes ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Writes the marker into a new directory on a disk. Call it before anything else is written there, the lock
        included. On a store, two runs could write it at once, and the later marker would replace the earlier: there, the
        run's claim is written first, and `settle` writes the marker.

        Another run may have begun there since `look`: its marker stays. If that run has ended when this one gets the lock,
        the second `look` compares the datasets."""
        if self.state == NEW:
            try:
                self._find_state(self._names())
                if self.state == NEW and isinstance(self.fs, pafs.LocalFileSystem):
                    self._mark(lambda _, path, data: write_if_absent(path, data))
            except OSError as error:
                reason = error.strerror or one_line(error)
                raise ConfigError(f"output.path: cannot write into {self.root}: {reason}", key="output.path") from None

    def settle(self) -> None:
        """Writes the marker, and the list of files of an old output. The caller holds the lock and has then called `look`
        again."""
        if self.state == OLD:
            self._record()
        listed = self.marked.get("dataset")
        if self.state != OWN or [listed, self.marked.get("output")] != [self._dataset(), self.output]:
            self._mark()

    def _dataset(self) -> str | list[str]:
        return self.dataset[0] if len(self.dataset) == 1 else self.dataset

    def _mark(self, write: Write = write_atomic) -> None:
        self.marked = {
            "format": FORMAT,
            "eagleray": _version(),
            "dataset": self._dataset(),
            "output": self.output,
            "created_at": self.marked.get("created_at", time.time()),
        }
        self._write(MARKER, self.marked, write)

    def _record(self) -> None:
        self._write(FILES, {"eagleray_files": sorted(self.files)})

    def _write(self, name: str, value: dict[str, Any], write: Write = write_atomic) -> None:
        write(self.fs, f"{self.root}/{name}", orjson.dumps(value, option=orjson.OPT_INDENT_2))

    def intend(self, parts: Iterable[str]) -> list[str]:
        """Saves that these parts and the report will be written. If foreign files have such names, returns them and writes
        nothing."""
        wanted = {*parts, REPORT}
        there = {f"{folder}/{name}" for folder in (DATA, ERRORS) for name in self._listed(folder)}
        there |= {REPORT} if self._is_there(REPORT) else set()
        if foreign := sorted((wanted & there) - self.files):
            return foreign
        self.intended_before |= self.files
        self.files = (self.files & there) | wanted
        self._record()
        return []

    def drop_stale(self, kept: Collection[str]) -> None:
        """Removes parts of an earlier, longer run that are not in `kept`, and temporary files of killed writers."""
        for folder in (DATA, ERRORS):
            for name in self._listed(folder):
                path = f"{folder}/{name}"
                if is_temporary(name) or (path in self.files and path not in kept):
                    remove(self.fs, f"{self.root}/{path}")

    def commit(self, parts: Collection[str]) -> None:
        """Saves, after the manifest, that exactly these parts and the report are Eagleray's. Removes rows that a program
        gave to earlier runs."""
        self.files = {*parts, REPORT}
        self._record()
        for path in self._dataset_files():
            if is_dataset_file(path) and f"{self.output}/{path}" not in self.dataset:
                remove(self.fs, f"{self.root}/{path}")
                drop_directories(self.fs, f"{self.root}/{path}")

    def clear(self) -> None:
        """Removes the output and the ledger, for `run.resume=false`. The manifest goes first, so that no reader takes the
        rest for a complete output."""
        if self.state == NEW:
            return
        self._record()
        for name in (MANIFEST, REPORT, BUDGET):
            if read_own(self.fs, self.root, name) if name == BUDGET else self._is_there(name):
                remove(self.fs, f"{self.root}/{name}")
        self.drop_stale(())
        for name in self._listed(SEGMENTS):
            if is_segment(name) or is_temporary(name):
                remove(self.fs, f"{self.root}/{SEGMENTS}/{name}")
        self.intended_before |= self.files
        self.files = set()
        self._record()

    def may_upload(self, key: str) -> bool:
        """True if this run or an earlier one may have begun to upload a file to this path below the root."""
        return is_own_key(key, self.files | self.intended_before)


def _version() -> str:
    try:
        return version("eagleray")
    except PackageNotFoundError:
        return "unknown"
