"""The lock that allows one run at a time in an output directory.

On a disk of one machine, the kernel holds the lock and releases it when the process ends. An object store has no locks. A
network file system may have no locks, may apply them to one machine only, or may drop them when a machine is suspended. On
both, a run holds a claim (`claim.py`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow.fs as pafs

from engines.errors import ConfigError, ErrorCode
from engines.text import one_line
from pipeline.storage.claim import STALE_S, hold_claim
from pipeline.storage.filesystem import listing
from pipeline.storage.output_files import LOCK, SEGMENTS, is_claim

# Linux's names of file systems that several machines may use. Names that begin with "fuse." count as well.
_SHARED = frozenset(
    ("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "orangefs", "smb3", "virtiofs")
)
# `held` takes the lock for a moment. A run waits this long for it to be released.
HELD_S = 1.0


@contextmanager
def run_lock(fs: pafs.FileSystem, root: str) -> Iterator[None]:
    """Holds the output directory. Raises `ConfigError` if another run holds it."""
    text = f"another run is writing into {root}: wait for it, stop it, or choose another output.path"
    busy = ConfigError(text, code=ErrorCode.OUTPUT_BUSY)
    with contextlib.ExitStack() as stack:
        try:
            file = None
            if isinstance(fs, pafs.LocalFileSystem):
                os.makedirs(f"{root}/{SEGMENTS}", exist_ok=True)
                file = _lock_file(root)
            if file is not None:
                stack.enter_context(file)  # the lock ends when the file is closed
            if file is None or is_shared(root):
                stack.enter_context(hold_claim(fs, root, locked=file is not None))
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            raise ConfigError(
                f"output.path: cannot write into {root}: {error.strerror or one_line(error)}", key="output.path"
            ) from None
        yield


def held(fs: pafs.FileSystem, root: str) -> bool:
    """True if a run holds the output directory. Changes nothing there and needs no write permission."""
    if isinstance(fs, pafs.LocalFileSystem):
        with suppress(FileNotFoundError), Path(root, SEGMENTS, LOCK).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if not _means_no_locks(error):
                    return True
    claims = [info for info in listing(fs, f"{root}/{SEGMENTS}") if is_claim(info.base_name)]
    return any(time.time() - (claim.mtime_ns or 0) / 1e9 < STALE_S for claim in claims)


def _lock_file(root: str) -> BinaryIO | None:
    """The open, locked file; None if the file system has no locks. Raises `BlockingIOError` if another process has the
    lock."""
    file = Path(root, SEGMENTS, LOCK).open("ab")  # noqa: SIM115 -- the caller closes it
    deadline = time.monotonic() + HELD_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise
            time.sleep(0.05)
        except OSError as error:
            file.close()
            if _means_no_locks(error):
                return None
            raise


def _means_no_locks(error: OSError) -> bool:
    return error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def is_shared(path: str, mounts: str = "/proc/self/mountinfo") -> bool:
    """True if several machines may use the file system of `path`. False where the system has no list of mounts (macOS)."""
    kinds: dict[str, str] = {}
    with suppress(OSError):
        for line in Path(mounts).read_text(errors="surrogateescape").splitlines():
            mount, _, source = line.partition(" - ")
            kinds[mount.split()[4].replace(r"\040", " ")] = source.split()[0]  # a later mount covers an earlier one
    real = Path(os.path.realpath(path))
    kind = next((kinds[str(place)] for place in (real, *real.parents) if str(place) in kinds), "")
    return kind in _SHARED or kind.startswith("fuse.")
