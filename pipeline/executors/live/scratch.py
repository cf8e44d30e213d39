"""The directory of Ray's files for one run on this machine. Directories of killed runs are removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

# The driver keeps a lock on this file. The kernel releases it when the driver ends in any way.
DRIVER = ".eagleray-driver"


class Scratch:
    """A new directory. It is removed by `remove`, or, if this process is killed, by the next run on this machine."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="eagleray-")
        # The file gets its name when it is locked already: another run must not find it unlocked.
        unnamed = Path(self.path, f"{DRIVER}-new")
        self.lock: BinaryIO = unnamed.open("xb")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        unnamed.rename(Path(self.path, DRIVER))

    def keep(self) -> None:
        """Keeps the directory for its logs: no later run removes it."""
        Path(self.path, DRIVER).unlink(missing_ok=True)
        self.lock.close()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.lock.close()


def remove_leftovers() -> None:
    """Removes the directories of runs whose driver was killed and whose Ray has ended. Only directories of this user count
    that have the driver's file, unlocked, and that no process names in its command line, as Ray's processes do."""
    for file in Path(tempfile.gettempdir()).glob(f"eagleray-*/{DRIVER}"):
        with contextlib.suppress(OSError), file.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_uid == os.geteuid() and not _is_in_use(str(file.parent)):
                shutil.rmtree(file.parent, ignore_errors=True)


def _is_in_use(path: str) -> bool:
    """True if a process has `path` in its command line, or if the system does not show command lines."""
    found = False
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found = True
            if os.fsencode(path) in process.read_bytes():
                return True
    return not found
