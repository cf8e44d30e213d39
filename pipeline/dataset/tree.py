"""Lists the input files below a directory. Skips outputs of Eagleray and resolves symbolic links."""

from __future__ import annotations

import os
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.fs as pafs

from engines.text import encodable
from pipeline.storage.filesystem import FileStamp
from pipeline.storage.output_files import BATCHES, MANIFEST, MARKER, SEGMENTS, is_output


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or directory. Two entries with the same `real` are one file under two names."""

    name: str  # relative to the root of the walk
    is_file: bool
    real: str  # the path without symbolic links
    linked: bool = False  # reached through a symbolic link
    stamp: FileStamp | None = field(default=None, compare=False)  # on a store, whose listing has it


@dataclass(slots=True)
class Tree:
    """The result of a walk."""

    entries: list[Entry] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)  # skipped outputs of Eagleray, relative to the root; "" is the root
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> names, relative to the root

    def skip(self, reason: str, names: Iterable[str]) -> None:
        if names := list(names):
            self.skipped.setdefault(reason, []).extend(names)


HIDDEN = 'they begin with "." or "_"'


# A name up to its first part that is hidden.
_HIDDEN = re.compile(r"([^._/][^/]*/)*[._][^/]*")
Wanted = Callable[[str], bool]


def printable(path: str) -> str:
    """The path with escapes in the place of bytes that are not UTF-8. Python gives such bytes as halves of UTF-16 pairs,
    which no output can hold."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # halves that stand for no byte
        return encodable(path)


def walk(
    fs: pafs.FileSystem, root: str, *, levels: int | None = None, hidden: bool = False, wanted: Wanted = lambda _: False
) -> Tree:
    """The entries below `root`, down to `levels` levels. Without `levels`, each directory is visited once, even if several
    links lead to it.

    Outputs of Eagleray are skipped, except their directories for whose name `wanted` returns True. Links into an output are
    skipped too. `hidden` includes names that begin with "." or "_". Raises `OSError`.
    """
    if isinstance(fs, pafs.LocalFileSystem):
        return _Disk(fs, os.path.realpath(root), levels, hidden, wanted).walk()
    return _walk_store(fs, root, levels, wanted)


def once(entries: Iterable[Entry]) -> list[Entry]:
    """Each file once, sorted by name. A name without links is preferred."""
    found: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda entry: (entry.linked, entry.name)):
        found.setdefault(entry.real, entry)
    return sorted(found.values(), key=lambda entry: entry.name)


def below(directory: Entry, entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries of a walk of `directory`, with names relative to the root of the walk that found `directory`."""
    for entry in entries:
        yield replace(entry, name=f"{directory.name}/{entry.name}", linked=entry.linked or directory.linked)


def _walk_store(fs: pafs.FileSystem, root: str, levels: int | None, wanted: Wanted) -> Tree:
    """A walk of a store: one listing; outputs are recognized in it afterwards."""
    listed = fs.get_file_info(pafs.FileSelector(root or "/", recursive=levels != 1, allow_not_found=True))
    infos = [(info.path.removeprefix(root).lstrip("/"), info) for info in listed]
    names = defaultdict[str, set[str]](set)
    for name, info in infos:
        names[name.rpartition("/")[0]].add(info.base_name)
    tree = Tree()
    outputs = {at for at in names if is_output(fs, f"{root}/{at}".rstrip("/"), names[at])}

    def passed_over(name: str) -> bool:
        parts = name.split("/")
        above = ("/".join(parts[:at]) for at in range(len(parts)))
        return any(at in outputs and not wanted("/".join(parts[: _depth(at) + 1])) for at in above)

    tree.outputs = sorted(outputs)
    tree.skip(HIDDEN, sorted({found[0] for name, _ in infos if (found := _HIDDEN.match(name)) and not passed_over(name)}))
    for name, info in infos:
        if name and not (outputs and passed_over(name)):
            tree.entries.append(
                Entry(name, info.is_file, f"{fs.type_name}:{info.path}", stamp=FileStamp.from_info(fs, info))
            )
    return tree


def _depth(name: str) -> int:
    return name.count("/") + 1 if name else 0


class _Disk:
    """A walk on a disk. Links are followed after all real directories, so that a directory is known under its real name."""

    def __init__(self, fs: pafs.FileSystem, root: str, levels: int | None, hidden: bool, wanted: Wanted) -> None:
        self.fs, self.root, self.levels, self.hidden, self.wanted = fs, root, levels, hidden, wanted
        self.tree = Tree()
        self.seen = {root}
        self.known: dict[str, bool] = {}  # directory -> True if it is an output
        self.todo = deque([Entry("", False, root)])
        self.links = deque[Entry]()

    def walk(self) -> Tree:
        while self.todo or self.links:
            if not self.todo:
                link = self.links.popleft()
                if not (self.levels is None and link.real in self.seen):
                    self.seen.add(link.real)
                    self.todo.append(link)
                continue
            self._look_into(self.todo.popleft())
        return self.tree

    def _look_into(self, directory: Entry) -> None:
        with os.scandir(directory.real) as scan:
            found = sorted(scan, key=lambda entry: entry.name)
        output = self._is_output(directory.real, {entry.name for entry in found})
        if output:
            self.tree.outputs.append(directory.name)
        for inside in found:
            name = f"{directory.name}/{inside.name}".lstrip("/")
            if output and not self.wanted(name):
                continue
            if inside.name[0] in "._" and not self.hidden:
                self.tree.skip(HIDDEN, [name])
                continue
            link = inside.is_symlink()
            real = os.path.realpath(inside.path) if link else f"{directory.real.rstrip('/')}/{inside.name}"
            if link and self._lies_in_output(real):
                continue
            entry = Entry(name, inside.is_file(), real, directory.linked or link)
            if entry.is_file:
                self.tree.entries.append(entry)
            elif inside.is_dir():
                self._note(entry, link)

    def _note(self, directory: Entry, link: bool) -> None:
        self.tree.entries.append(directory)
        if self.levels is not None and _depth(directory.name) >= self.levels:
            return
        if link:
            self.links.append(directory)
        elif self.levels is not None or directory.real not in self.seen:
            self.seen.add(directory.real)
            self.todo.append(directory)

    def _lies_in_output(self, real: str) -> bool:
        """True if the target of a link lies in an output that does not contain the root of the walk."""
        for place in Path(real).parents:
            if Path(self.root).is_relative_to(place):
                return False
            likely = (MARKER, SEGMENTS, BATCHES, MANIFEST)
            if str(place) not in self.known and not any((place / name).exists() for name in likely):
                self.known[str(place)] = False
            if self._is_output(str(place)):
                return True
        return False

    def _is_output(self, place: str, names: set[str] | None = None) -> bool:
        if place not in self.known:
            names = names if names is not None else {path.name for path in Path(place).iterdir()}
            self.known[place] = is_output(self.fs, place, names)
        return self.known[place]
