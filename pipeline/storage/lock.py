"""The lock that allows one run at a time in an output directory."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.fs as pafs
from filelock import FileLock, Timeout

from engines.errors import ConfigError, ErrorCode
from engines.text import one_line
from pipeline.storage.filesystem import listing, write_atomic
from pipeline.storage.output_files import LOCK, SEGMENTS, is_claim

BEAT_S = 10.0
STALE_S = 60.0  # six missed beats: the holder is dead
CLAIM = "_lock-"


@contextmanager
def run_lock(fs: pafs.FileSystem, root: str) -> Iterator[None]:
    """Holds the output directory. Raises `ConfigError` if another run holds it.

    On a disk, the kernel holds the lock and releases it when the process dies. An object store has no locks: each run
    writes a small object, a claim, and rewrites it every 10 s. A run that finds another run's claim younger than 60 s
    stops.
    """
    text = f"another run is writing into {root}: wait for it, stop it, or choose another output.path"
    busy = ConfigError(text, code=ErrorCode.OUTPUT_BUSY)
    if isinstance(fs, pafs.LocalFileSystem):
        lock = FileLock(f"{root}/{SEGMENTS}/{LOCK}")
        try:
            os.makedirs(f"{root}/{SEGMENTS}", exist_ok=True)
            lock.acquire(timeout=1)  # not 0, because `held` takes the lock for a moment
        except Timeout:
            raise busy from None
        except OSError as error:
            raise ConfigError(f"output.path: cannot write into {root}: {error.strerror or error}") from None
        try:
            yield
        finally:
            lock.release()
        return
    with _claim(fs, root, busy):
        yield


def held(fs: pafs.FileSystem, root: str) -> bool:
    """True if a run holds the output directory. Changes nothing there and needs no write permission."""
    if isinstance(fs, pafs.LocalFileSystem):
        with suppress(FileNotFoundError), Path(root, SEGMENTS, LOCK).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False
    claims = [info for info in listing(fs, f"{root}/{SEGMENTS}") if is_claim(info.base_name)]
    return any(time.time() - (claim.mtime_ns or 0) / 1e9 < STALE_S for claim in claims)


@contextmanager
def _claim(fs: pafs.FileSystem, root: str, busy: ConfigError) -> Iterator[None]:
    """Holds the output directory with a claim. Each run writes its claim first and lists the claims then, so of two runs
    at least one sees the other's claim and stops.

    The store's clock measures ages: the time of another claim is compared with the time of ours.
    """
    own_name = f"{CLAIM}{uuid.uuid4().hex}.json"
    path = f"{root}/{SEGMENTS}/{own_name}"
    stop = threading.Event()

    def write() -> None:
        write_atomic(fs, path, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())

    def keep_claim() -> None:
        while not stop.wait(BEAT_S):
            with suppress(OSError):  # the store is unavailable; the next beat may succeed
                write()

    try:
        write()
        claims = {info.base_name: info for info in listing(fs, f"{root}/{SEGMENTS}") if is_claim(info.base_name)}
    except OSError as error:
        raise ConfigError(f"output.path: cannot write into {root}: {one_line(error)}") from None
    now = claims[own_name].mtime_ns or 0
    thread = threading.Thread(target=keep_claim, name="lock", daemon=True)
    thread.start()
    try:
        for name, claim in claims.items():
            if name != own_name and now - (claim.mtime_ns or 0) < STALE_S * 1e9:
                raise busy
        yield
    finally:
        stop.set()
        thread.join()
        with suppress(OSError):
            for name, claim in claims.items():
                if name == own_name or now - (claim.mtime_ns or 0) >= STALE_S * 1e9:
                    fs.delete_file(claim.path)
