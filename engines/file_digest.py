"""Digests of local files that shape answers. A file that did not change is read once in a process."""

from __future__ import annotations

import functools
import hashlib
import stat
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

# A file up to this size is read whole. Of a larger one, samples are read: `SAMPLES` pieces, spread evenly, first and last
# byte included.
WHOLE_BYTES, SAMPLES, SAMPLE_BYTES = 16 << 20, 64, 64 << 10
# The number of digests that a process remembers.
REMEMBERED = 1 << 16

# The files of a checkpoint or adapter: weights, configurations, tokenizers, templates, code.
_MODEL_FILES = frozenset(
    (".json", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".model", ".txt", ".jinja", ".tiktoken", ".vocab", ".py")
)
# Files that training leaves beside the model.
_TRAINING = ("optimizer", "scheduler", "trainer_state", "training_args", "rng_state", "README", "LICENSE")


class FileDigest(NamedTuple):
    """The content of a file or directory at one moment."""

    sha256: str
    modified_ms: int  # when it last changed, in ms since the epoch


def file_digest(path: str | Path, base: str = "") -> FileDigest | None:
    """The digest of a file; None if there is no regular file or it cannot be read. `base`: see `_located`."""
    try:
        path = _located(path, base)
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            return None
        return FileDigest(_digest(str(path), info.st_size, info.st_mtime_ns), info.st_mtime_ns // 1_000_000)
    except (OSError, ValueError, RuntimeError):  # a NUL in the name, a home of an unknown user
        return None


def model_digest(path: str | Path, names: Collection[str] = (), base: str = "") -> FileDigest | None:
    """The digest of a model's file, or of the model's files in a directory; None if there is neither.

    `names` selects files of the directory. Subdirectories are not read. `base`: see `_located`.
    """
    try:
        path = _located(path, base)
        if not path.is_dir():
            return file_digest(path)
        found = {entry.name: file_digest(entry) for entry in path.iterdir() if _is_model_file(entry, names)}
    except (OSError, ValueError, RuntimeError):
        return None
    digests = {name: digest for name, digest in sorted(found.items()) if digest is not None}
    if not digests:
        return None
    lines = "".join(f"{name}\0{digest.sha256}\n" for name, digest in digests.items())
    modified = max(digest.modified_ms for digest in digests.values())
    return FileDigest(hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest(), modified)


def _located(path: str | Path, base: str) -> Path:
    """A relative path is one below `base`, the working directory of the driver, if there is such a file: a process of Ray
    may have another working directory."""
    path = Path(path).expanduser()
    there = Path(base) / path
    return there if base and there.exists() else path


def _is_model_file(entry: Path, names: Collection[str]) -> bool:
    if names:
        return entry.name in names
    return entry.suffix in _MODEL_FILES and not entry.name.startswith((".", *_TRAINING))


@functools.lru_cache(maxsize=REMEMBERED)
def _digest(path: str, size: int, mtime_ns: int) -> str:
    """The sha256 of a file. Size and time are parameters so that a changed file is read again."""
    with Path(path).open("rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(size.to_bytes(8, "big"))
        for sample in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()
