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

from engines.text import one_line
from engines.types import ConfigError

# pyarrow's own clients; every other scheme goes through fsspec.
_NATIVE = ("s3", "gs", "gcs")
_URI = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/{2}(.*)$", re.DOTALL)
# "?endpoint_override=…" after an s3:// path, a signature after an https:// one; a bare "?" is a glob character.
_OPTIONS = re.compile(r"\?[\w-]+=[^/].*$")


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI and the path inside it; touches no file.

    Raises `ConfigError` for a scheme nobody knows, one whose package is missing, and credentials in a URI.
    """
    uri = _URI.match(path)
    scheme, rest = (uri[1].lower(), uri[2]) if uri else ("file", path)
    if scheme == "file":
        plain = Path(urllib.parse.unquote(rest)) if uri else Path(rest).expanduser()
        return pafs.LocalFileSystem(), os.path.abspath(plain)  # absolute: a worker has another current directory
    if scheme not in _NATIVE:
        return _through_fsspec(scheme, path)
    rest, options = split_options(rest)
    bucket = rest.split("/", 1)[0]
    if ":" in bucket:
        raise ConfigError(f"{scheme}://…@… holds credentials: keep them in the environment, not in a path")
    user = bucket[: bucket.rfind("@") + 1]
    return _native(f"{scheme}://{bucket}{options}"), rest.removeprefix(user).rstrip("/")


def split_options(path: str) -> tuple[str, str]:
    """`("s3://bucket/key", "?region=…")` of `s3://bucket/key?region=…`."""
    options = _OPTIONS.search(path)
    return (path[: options.start()], options[0]) if options else (path, "")


@functools.lru_cache(maxsize=32)
def _native(bucket: str) -> pafs.FileSystem:
    """One client per bucket: making one may ask the store for the bucket's region."""
    try:
        return pafs.FileSystem.from_uri(bucket)[0]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"cannot open {bucket}: {one_line(error)}") from None


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
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself must survive a power cut too
    finally:
        os.close(directory)
