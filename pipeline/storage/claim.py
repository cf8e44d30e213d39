"""A run's claim to an output directory: a small object in `_segments/` that the run rewrites every 10 s.

A run that finds another claim younger than 60 s stops. An older claim belongs to a run that is dead or suspended. The new
run replaces it:

1. It writes its own claim with the names of the claims that it replaces.
2. It waits `WAIT_S`. If one of them was renewed in the meantime, the new run stops.
3. It deletes them.

A suspended run that continues finds that its claim is gone, or that another claim names it as replaced. Each process of a
run checks the claim before each write below the output, so such a run writes nothing more. Only a request that was sent
before the suspension may still arrive.

Each run writes its claim first and looks for other claims afterwards, so at least one of two runs sees the other. Both runs
may stop, but at most one of them continues. Ages are differences of the store's own times, so the clocks of the machines
do not matter. No conditional write is needed.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow.fs as pafs

from engines.errors import ErrorCode
from pipeline.errors import Stopped
from pipeline.storage.filesystem import GUARDS, delete, exists, listing, put
from pipeline.storage.output_files import CLAIM, SEGMENTS, is_claim, read_json

BEAT_S = 10.0
STALE_S = 60.0  # six missed beats
# A run that replaces a claim waits longer than the renewal of a claim may take.
RENEW_S, WAIT_S = 5.0, 6.0
# Runs that start at the same moment all delete their claims and try again: the first by name at once, the others later.
TRIES, AT_ONCE_S, LATER_S = 4, 0.1, 2.0
# The maximum number of claims that one claim names as replaced.
MOST_REPLACED = 100

_claims: dict[str, Claim] = {}  # output directory -> the claim of this process's run


@dataclass
class Claim:
    """The claim of a run, in each of its processes."""

    fs: pafs.FileSystem
    root: str
    path: str
    lost: bool = field(default=False, init=False)

    def check(self) -> None:
        """Raises `Stopped` if another run has replaced this one."""
        if not self.lost:
            self.lost = not self.is_there()
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """As `check`, without a request to the store: uses only what this process already knows."""
        if self.lost:
            text = (
                f"another run has taken over {self.root}, because this one was suspended or did not reach the store for "
                f"over {STALE_S:g} s; this one writes nothing more there"
            )
            raise Stopped(text, code=ErrorCode.OUTPUT_TAKEN)

    def is_there(self) -> bool:
        if isinstance(self.fs, pafs.LocalFileSystem):
            try:
                with Path(self.path).open("rb"):  # a network file system answers `stat` from a cache
                    return True
            except FileNotFoundError:
                return False
        return exists(self.fs, self.path)


def join_claim(fs: pafs.FileSystem, root: str, path: str | None) -> None:
    """From now on, this process checks the claim of its run before each write below `root`. `path`: the claim's path;
    None if the run needs no claim."""
    _join(root, None if path is None else Claim(fs, root, path))


def claim_of(root: str) -> Claim | None:
    """The claim that this process checks before it writes below `root`."""
    return _claims.get(root)


def _join(root: str, claim: Claim | None) -> None:
    if claim is None:
        _claims.pop(root, None)
        GUARDS.pop(root, None)
    else:
        _claims[root], GUARDS[root] = claim, claim.check


@contextmanager
def hold_claim(fs: pafs.FileSystem, root: str, *, locked: bool) -> Iterator[None]:
    """Claims the output directory. Raises `BlockingIOError` if another run has it. `locked`: this run has the kernel's
    lock of the directory. Then every other claim from this boot of the machine belongs to a process that has ended."""
    holder = ClaimHolder(fs, root, _boot() if locked else "")
    try:
        holder.acquire()
        _join(root, holder)
        thread = threading.Thread(target=holder.keep, name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            holder.ended.set()
            thread.join()
    finally:
        if claim_of(root) is holder:
            _join(root, None)
        with suppress(OSError):
            delete(fs, holder.path)


@dataclass(frozen=True, slots=True)
class _OtherClaim:
    """The claim of another run."""

    age_s: float = field(compare=False)  # at the last write of our claim
    renewed: object  # changes with each renewal
    content: dict[str, Any] = field(compare=False)


class ClaimHolder(Claim):
    """The claim in the driver, which renews it."""

    def __init__(self, fs: pafs.FileSystem, root: str, boot: str) -> None:
        super().__init__(fs, root, f"{root}/{SEGMENTS}/{CLAIM}{uuid.uuid4().hex}.json")
        self.name = self.path.rpartition("/")[2]
        self.boot = boot
        self.replaced: list[str] = []
        self.settled = False  # `acquire` has succeeded: the output is this run's
        self.written = 0.0  # this machine's time of the last renewal
        self.stored = 0.0  # the store's time of the last renewal
        self.ended = threading.Event()

    def acquire(self) -> None:
        """Raises `BlockingIOError` if another run has the output."""
        for tries_left in reversed(range(TRIES)):
            try:
                self._take()
                self.settled = True
                self._write()
                return
            except _SimultaneousStart as others:
                delete(self.fs, self.path)
                if not tries_left:
                    raise
                time.sleep(AT_ONCE_S if self.name < min(others.args[0]) else random.uniform(LATER_S / 2, LATER_S))

    def _take(self) -> None:
        """Writes the claim, then looks for others."""
        self._write()
        others = self._others()
        alive = {name: other for name, other in others.items() if not self._is_dead(other) and other.age_s < STALE_S}
        if any(other.content.get("settled", True) for other in alive.values()):
            raise BlockingIOError
        if alive:
            raise _SimultaneousStart(list(alive))
        if not others:
            return
        replaced_before = {name for other in others.values() for name in other.content.get("replaced", ())}
        self.replaced = [*sorted(replaced_before), *others][-MOST_REPLACED:]
        self._write()
        if not all(map(self._is_dead, others.values())):
            time.sleep(WAIT_S)
        # A claim that was written after the first look belongs to a run that sees our claim.
        now = self._others()
        if any(now.get(name) != other for name, other in others.items()):
            raise BlockingIOError
        for name in others:
            delete(self.fs, f"{self.root}/{SEGMENTS}/{name}")

    def keep(self) -> None:
        """Renews the claim until the end of the run."""
        while not self.lost and not self.ended.wait(BEAT_S):
            with suppress(OSError):  # the store is unavailable; the next renewal may succeed
                self.renew()

    def renew(self) -> None:
        """Rewrites the claim, unless another run has replaced it: then `lost` is set."""
        stored_before, began = self.stored, time.time()
        if self.is_there():
            self._write(patience_s=0.0)
            others = self._others()
            replaced = any(self.name in other.content.get("replaced", ()) for other in others.values())
            # If this process was suspended between the look and the write, another run may have come and gone.
            slow = time.time() - began > RENEW_S and self.stored - stored_before >= STALE_S
            if not replaced and not slow:
                return
        self.lost = True

    def _write(self, **options: float) -> None:
        self.written = time.time()
        content = {
            "host": socket.gethostname(), "pid": os.getpid(), "boot": _boot(), "at": self.written,
            "settled": self.settled, "replaced": self.replaced,
        }  # fmt: skip
        put(self.fs, self.path, orjson.dumps(content), **options)

    def _others(self) -> dict[str, _OtherClaim]:
        """The claims of other runs, by name. Also sets `stored`, the store's time of our claim."""
        folder = f"{self.root}/{SEGMENTS}"
        times = {info.base_name: info.mtime_ns for info in listing(self.fs, folder) if is_claim(info.base_name)}
        own = times.pop(self.name, None)
        self.stored = own / 1e9 if own is not None else self.written
        others: dict[str, _OtherClaim] = {}
        for name, time_ns in times.items():
            content = _content(self.fs, f"{folder}/{name}")
            at = content.get("at", 0.0)
            # Some stores report no times. Then the clocks of the machines give the age.
            age_s = self.written - at if None in (own, time_ns) else self.stored - time_ns / 1e9
            others[name] = _OtherClaim(age_s, (time_ns, at), content)
        return others

    def _is_dead(self, other: _OtherClaim) -> bool:
        """True if the other run was on this machine and had the kernel's lock, which this run has now."""
        return bool(self.boot) and other.content.get("boot") == self.boot


def _content(fs: pafs.FileSystem, path: str) -> dict[str, Any]:
    """The content of a claim that was listed. Some stores do not replace an object in one step: while its run rewrites the
    claim, it may be missing for a moment. Empty if it stays missing."""
    for wait_s in (0.05, 0.2, None):
        if (found := read_json(fs, path)) is not None:
            return found
        if wait_s is not None:
            time.sleep(wait_s)
    return {}


class _SimultaneousStart(BlockingIOError):
    """Other runs start at the same moment. `args[0]` is a list of the names of their claims."""


def _boot() -> str:
    """The kernel's id of this boot of the machine. Empty if the system has no such id."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
