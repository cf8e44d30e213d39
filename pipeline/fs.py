"""Files wherever they are: a path or URI to a pyarrow filesystem and the path inside it."""

from __future__ import annotations

import functools
import os
import posixpath
import re
import urllib.parse
import uuid
from pathlib import Path

import pyarrow as pa
from pyarrow import fs as pafs

from engines.types import ConfigError

# pyarrow's own clients; every other scheme goes through fsspec.
_NATIVE = ("s3", "gs", "gcs", "hdfs")
_URI = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/{2}(.*)$", re.DOTALL)
# "?endpoint_override=…" after an s3:// or gs:// path; a bare "?" is a glob character or part of a key.
_OPTIONS = re.compile(r"\?([a-z_]+=[^/].*)$")


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI and the path inside it; touches no file.

    Raises `ConfigError` for a scheme nobody knows, one whose package is missing, and credentials in a URI.
    """
    scheme, rest = split_scheme(path)
    if scheme == "file":
        return _local(), _absolute(rest)
    if scheme not in _NATIVE:
        return _through_fsspec(scheme, path)
    options = _OPTIONS.search(rest)
    inner = rest[: options.start()] if options else rest
    bucket = inner.split("/", 1)[0]
    if ":" in bucket.rpartition("@")[0]:
        raise ConfigError(f"{scheme}://…@… holds credentials: keep them in the environment, not in a path")
    return _native(scheme, bucket, options[1] if options else ""), inner.rpartition("@")[2].rstrip("/")


def split_scheme(path: str) -> tuple[str, str]:
    """`("s3", "bucket/key")` of `s3://bucket/key`; a plain path has the scheme `file`."""
    match = _URI.match(path)
    if not match:
        return "file", str(Path(path).expanduser()) if path.startswith("~") else path
    scheme = match[1].lower()
    return scheme, urllib.parse.unquote(match[2]) if scheme == "file" else match[2]


def uri_of(origin: str, inner: str) -> str:
    """What `resolve` takes back to `inner`, a path found in the filesystem of `origin`."""
    scheme, rest = split_scheme(origin)
    if scheme == "file":
        return inner
    if scheme in _NATIVE:
        options = _OPTIONS.search(rest)
        user = rest.split("/", 1)[0].rpartition("@")[0]
        return f"{scheme}://{user}{'@' if user else ''}{inner}{options[0] if options else ''}"
    if "::" in origin or inner.startswith(f"{scheme}://"):
        return inner
    # fsspec strips host and scheme differently for each scheme; both sides are put through the same stripping.
    return f"{scheme}://{inner}"


def exists(fs: pafs.FileSystem, path: str) -> bool:
    """Whether a file or directory is there."""
    return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)


def write_atomic(fs: pafs.FileSystem, path: str, data: bytes) -> None:
    """Writes a whole file so that no reader ever sees a part of it; parents are made as needed."""
    if not isinstance(fs, pafs.LocalFileSystem):
        if isinstance(fs, pafs.PyFileSystem) and posixpath.dirname(path):
            fs.create_dir(posixpath.dirname(path), recursive=True)
        with fs.open_output_stream(path, compression=None) as stream:  # an object appears whole, when it is closed
            stream.write(data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_directory(target.parent)


def _fsync_directory(path: Path) -> None:
    """The rename itself must survive a power cut too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _absolute(path: str) -> str:
    """Absolute, because a worker's current directory is another one."""
    return os.path.abspath(path)


@functools.lru_cache(maxsize=1)
def _local() -> pafs.FileSystem:
    return pafs.LocalFileSystem()


@functools.lru_cache(maxsize=32)
def _native(scheme: str, bucket: str, options: str) -> pafs.FileSystem:
    """One client per bucket: making one may ask the store for the bucket's region."""
    uri = f"{scheme}://{bucket}{'/' if scheme == 'hdfs' else ''}{'?' if options else ''}{options}"
    try:
        filesystem, _ = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"cannot open {scheme}://{bucket}: {one_line(error)}") from None
    return filesystem


def _through_fsspec(scheme: str, path: str) -> tuple[pafs.FileSystem, str]:
    import fsspec  # only those who use such a scheme need it

    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs a package that is not installed: {one_line(error)}") from None
    except ValueError:
        raise ConfigError(f"nothing here reads '{scheme}://' paths: {path!r:.200}") from None
    except Exception as error:  # each fsspec implementation has its own (no route, no credentials, …)
        raise ConfigError(f"cannot open {scheme}://: {one_line(error)}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), inner


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception's text as one line a person can read."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
