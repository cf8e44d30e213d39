"""One run at a time in one output directory."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow.fs as pafs
from filelock import FileLock, Timeout

from engines.types import ConfigError
from pipeline.fs import write_atomic
from pipeline.ledger import SEGMENTS

BEAT_S = 10.0
STALE_S = 60.0  # six beats missed: whoever held it is dead


@contextmanager
def run_lock(fs: pafs.FileSystem, root: str) -> Iterator[None]:
    """Holds the output directory; raises `ConfigError` where another run holds it.

    On a disk the kernel holds the lock and lets go of it the moment the process dies. An object store has no locks:
    there, a small object is rewritten every 10 s, and a run that finds one younger than a minute gives way.
    """
    held = ConfigError(f"another run is writing into {root}: wait for it, stop it, or choose another output.path")
    if isinstance(fs, pafs.LocalFileSystem):
        lock = FileLock(f"{root}/{SEGMENTS}/.lock")
        try:
            os.makedirs(f"{root}/{SEGMENTS}", exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise held from None
        except OSError as error:
            raise ConfigError(f"output.path: cannot write into {root}: {error.strerror or error}") from None
        try:
            yield
        finally:
            lock.release()
        return
    path, me = f"{root}/{SEGMENTS}/_lock.json", uuid.uuid4().hex
    beat = _read(fs, path)
    if beat is not None and time.time() - beat["time"] < STALE_S:
        raise held
    stop = threading.Event()

    def write() -> None:
        now = {"run": me, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        write_atomic(fs, path, json.dumps(now).encode())

    def keep() -> None:
        while not stop.wait(BEAT_S):
            write()

    write()
    beat = _read(fs, path)
    if beat is not None and beat["run"] != me:  # two started together: the later writer has it
        raise held
    keeper = threading.Thread(target=keep, name="lock", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
        fs.delete_file(path)


def _read(fs: pafs.FileSystem, path: str) -> dict[str, Any] | None:
    try:
        with fs.open_input_stream(path) as stream:
            beat: dict[str, Any] = json.loads(stream.read())
            return beat
    except (FileNotFoundError, ValueError, OSError):
        return None
