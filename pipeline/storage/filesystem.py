"""Files on any store: maps a path or URI to a pyarrow filesystem and the path inside it."""

from __future__ import annotations

import contextlib
import functools
import os
import posixpath
import re
import shutil
import tempfile
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
from pyarrow import fs as pafs

from engines.errors import ConfigError
from engines.text import one_line
from pipeline.storage.retry import PATIENCE_S, StoreError, patiently

# Schemes of pyarrow's own clients, and of our Azure client. Every other scheme goes through fsspec.
_NATIVE = ("s3", "gs", "gcs")
_AZURE = ("az", "abfs", "abfss")
_URI = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/{2}(.*)$", re.DOTALL)
# "?endpoint_override=…" after an s3:// path. A bare "?" is a glob character. In an https:// URL, it begins the query.
_OPTIONS = re.compile(r"\?[\w-]+=.*$", re.DOTALL)
_WITH_QUERY = re.compile(r"https?://[^?]*(\?)", re.IGNORECASE)
Buffer = bytes | memoryview
Content = Buffer | Path  # bytes, or a local file that has them
GLOB = re.compile(r"[*?\[]")
# Directory -> check. The check is called before each write or removal below the directory. It raises if neither is allowed.
GUARDS: dict[str, Callable[[], None]] = {}
# The name that `write_atomic` gives a file until it is complete.
TEMPORARY = re.compile(r"\.eagleray-[0-9a-f]{32}\.tmp")


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI, and the path inside it. Reads no file.

    Raises `ConfigError` for an unknown scheme, a scheme whose package is missing, and credentials in a URI.
    """
    uri = _URI.match(path)
    scheme, rest = (uri[1].lower(), uri[2]) if uri else ("file", path)
    if scheme == "file":
        plain = Path(urllib.parse.unquote(rest)) if uri else Path(rest).expanduser()
        return pafs.LocalFileSystem(), os.path.abspath(plain)  # absolute, because a worker has another current directory
    if scheme not in (*_NATIVE, *_AZURE):
        return _through_fsspec(scheme, path)
    rest, options = split_options(rest)
    bucket = rest.split("/", 1)[0]
    if ":" in bucket:
        raise ConfigError(f"a {scheme}://…@… path contains credentials: set them in the environment instead")
    if scheme in _AZURE:
        if options:
            raise ConfigError(
                f"a {scheme}:// path takes no options after '?': the account and its credentials come from the environment"
            )
        container, _, host = bucket.partition("@")
        return _azure(scheme, host), f"{container}{rest[len(bucket) :]}".rstrip("/")
    user = bucket[: bucket.rfind("@") + 1]
    return _native(f"{scheme}://{bucket}{options}"), rest.removeprefix(user).rstrip("/")


def split_options(path: str) -> tuple[str, str]:
    """Splits `s3://bucket/key?region=…` into `("s3://bucket/key", "?region=…")`."""
    query, options = _WITH_QUERY.match(path), _OPTIONS.search(path)
    at = query.start(1) if query else options.start() if options else len(path)
    return path[:at], path[at:]


def child(path: str, name: str) -> str:
    """The path or URI of an entry of a directory. Options of a URI stay at its end."""
    place, options = split_options(path) if "://" in path else (path, "")
    return f"{place.rstrip('/')}/{name}{options}"


def canonical_place(path: str) -> str:
    """The same text for every spelling of a path, glob or URI. Links on disks are followed; options and credentials of a
    URI are dropped. Sends no request to a store."""
    return posixpath.join(*split_glob(path)).rstrip("/") or "/"


def split_glob(path: str) -> tuple[str, str]:
    """The canonical place of a path, or of the directory that a glob searches; and the rest of the glob."""
    uri = _URI.match(path)
    local = not uri or uri[1].lower() == "file"
    place = resolve(path)[1] if local else _canonical_uri(path)
    # The name of a file may contain glob characters. On a store, a check for such a file would need a request.
    glob = None if local and os.path.lexists(place) else GLOB.search(place)
    at = place.rfind("/", 0, glob.start()) if glob else len(place)
    base, rest = place[:at], place[at + 1 :]
    return (os.path.realpath(base or "/") if local else base), rest


def _canonical_uri(path: str) -> str:
    scheme, _, rest = split_options(path)[0].partition("://")
    scheme = scheme.lower()
    bucket, slash, key = rest.rstrip("/").partition("/")
    if scheme in _AZURE:
        return f"az://{bucket}{slash}{key}"
    return f"{'gs' if scheme == 'gcs' else scheme}://{bucket.rpartition('@')[2]}{slash}{key}"


def is_within(place: str, other: str) -> bool:
    """True if the canonical place `place` equals `other` or lies below it."""
    return place == other or place.startswith(f"{other.rstrip('/')}/")


@functools.lru_cache(maxsize=32)
def _native(bucket: str) -> pafs.FileSystem:
    """One client per bucket. It is cached, because creating a client may ask the store for the bucket's region."""
    if bucket.startswith("s3:"):  # writes a small object with one request instead of three
        bucket += ("&" if "?" in bucket else "?") + "allow_delayed_open=true"
    elif "retry_limit_seconds=" not in bucket:  # the default is 15 minutes; a run could not stop in that time
        bucket += ("&" if "?" in bucket else "?") + "retry_limit_seconds=10"
    try:
        return pafs.FileSystem.from_uri(bucket)[0]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"cannot open {bucket}: {one_line(error)}") from None


def _azure(scheme: str, host: str) -> pafs.FileSystem:
    try:
        from pipeline.storage.azure import open_account
    except ImportError as error:
        install = "pip install 'eagleray[azure]'"
        raise ConfigError(f"{scheme}:// needs a package that is not installed ({one_line(error)}): {install}") from None
    return open_account(host)


def _through_fsspec(scheme: str, path: str) -> tuple[pafs.FileSystem, str]:
    import fsspec  # imported here, because only these schemes need it

    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except ImportError as error:
        install = ": pip install 'eagleray[hf]'" if scheme == "hf" else ""
        raise ConfigError(f"{scheme}:// needs a package that is not installed: {one_line(error)}{install}") from None
    except ValueError:
        raise ConfigError(f"there is no reader for '{scheme}://' paths: {path!r:.200}") from None
    except Exception as error:  # each fsspec implementation raises its own types (no route, no credentials, …)
        raise ConfigError(f"cannot open {scheme}://: {one_line(error)}") from None
    return pafs.PyFileSystem(_FSSpecHandler(filesystem)), inner


class _FSSpecHandler(pafs.FSSpecHandler):
    """Opens files with fsspec. A failed read raises `StoreError`."""

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_FSSpecFile(self.fs.open(path, "rb")), "r")


class _FSSpecFile:
    """A file of fsspec. A failed read raises `StoreError`: a broken connection must not look like a damaged file."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def read(self, *size: int) -> bytes:
        try:
            data: bytes = self.file.read(*size)
        except Exception as error:
            raise StoreError(one_line(error)) from None
        return data


def _check_guards(directory: str) -> None:
    for root, check in list(GUARDS.items()):
        if is_within(directory, root):
            check()


def info_of(fs: pafs.FileSystem, path: str) -> pafs.FileInfo:
    """The type, size and time of a path. A missing path has the type NotFound."""
    return patiently(lambda: fs.get_file_info(path))


class FileStamp(NamedTuple):
    """The size and the times of a file. They change when the file changes. None: the store does not tell."""

    size: int | None = None
    modified_ns: int | None = None
    changed_ns: int | None = None  # on a local disk: also changes if a file with an older time takes the place of this one

    @classmethod
    def of(cls, path: str) -> FileStamp:
        """The stamp of a path or URI."""
        fs, inner = resolve(path)
        return cls.from_info(fs, info_of(fs, inner))

    @classmethod
    def from_info(cls, fs: pafs.FileSystem, info: pafs.FileInfo) -> FileStamp:
        """The stamp of a file in a listing."""
        changed = None
        if isinstance(fs, pafs.LocalFileSystem):
            with contextlib.suppress(OSError):
                changed = Path(info.path).stat().st_ctime_ns
        return cls(info.size, info.mtime_ns, changed)


def exists(fs: pafs.FileSystem, path: str) -> bool:
    """True if there is a file or directory at `path`."""
    return bool(info_of(fs, path).type != pafs.FileType.NotFound)


def listing(fs: pafs.FileSystem, directory: str) -> list[pafs.FileInfo]:
    """The direct children of a directory. Empty if the directory does not exist."""
    return patiently(lambda: fs.get_file_info(pafs.FileSelector(directory, allow_not_found=True)))


def remove(fs: pafs.FileSystem, *paths: str) -> None:
    """Deletes files. A missing file is no error: an earlier try may have deleted it before the store failed."""
    for directory in {posixpath.dirname(path) for path in paths}:
        _check_guards(directory)
    for path in paths:
        delete(fs, path)


def delete(fs: pafs.FileSystem, path: str) -> None:
    """As `remove`, without the checks of `GUARDS`."""

    def attempt() -> None:
        with contextlib.suppress(FileNotFoundError):
            fs.delete_file(path)

    patiently(attempt)


def abort_uploads(path: str, ours: Callable[[str], bool]) -> None:
    """Aborts multipart uploads below an s3:// path that killed writers left unfinished. No listing shows such
    uploads, and the store charges for them. `ours(key)` is true if Eagleray started the upload to `key`,
    which is relative to `path`.

    Does nothing on other stores, or if boto3 is not installed. In these cases, use a lifecycle rule of the bucket.
    """
    uri = _URI.match(path)
    if not uri or uri[1].lower() != "s3":
        return
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return
    rest, options = split_options(uri[2])
    given = dict(urllib.parse.parse_qsl(options[1:]))
    bucket, _, key = rest.partition("/")
    endpoint = given.get("endpoint_override")
    url = endpoint and f"{given.get('scheme', 'https')}://{endpoint}"
    with contextlib.suppress(BotoCoreError, ClientError):  # for example, no permission to list uploads
        client = boto3.client("s3", endpoint_url=url, region_name=given.get("region"))
        prefix = key.strip("/") + "/" if key.strip("/") else ""
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
        for upload in (upload for page in pages for upload in page.get("Uploads", [])):
            if not ours(upload["Key"].removeprefix(prefix)):
                continue
            client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def write_atomic(fs: pafs.FileSystem, path: str, data: Content) -> None:
    """Writes a file so that no reader sees a part of it. Creates missing parent directories."""
    _check_guards(posixpath.dirname(path))
    put(fs, path, data)


def put(fs: pafs.FileSystem, path: str, data: Content, patience_s: float = PATIENCE_S) -> None:
    """As `write_atomic`, without the checks of `GUARDS`. Repeats temporary failures of the store for up to
    `patience_s` seconds."""
    if isinstance(fs, pafs.LocalFileSystem):
        _put_local(Path(path), data, lambda temporary, target: temporary.replace(target))
        return
    if isinstance(fs, pafs.PyFileSystem) and posixpath.dirname(path):
        fs.create_dir(posixpath.dirname(path), recursive=True)

    def attempt() -> None:  # an object appears complete when the stream closes, so no temporary name is needed
        with fs.open_output_stream(path, compression=None) as stream:
            _fill(stream, data)

    patiently(attempt, patience_s)


def _fill(file: Any, data: Content) -> None:
    if isinstance(data, Path):
        with data.open("rb") as source:
            shutil.copyfileobj(source, file, 8 << 20)
    else:
        file.write(data)


def absolute(path: str) -> str:
    """A local path as an absolute path, for processes with another current directory. A URI stays as it is."""
    return path if _URI.match(path) else os.path.abspath(Path(path).expanduser())


def write_if_absent(path: str, data: bytes) -> None:
    """As `write_atomic` on a disk, but keeps an existing file. If two processes call it at once, the first file stays."""
    with contextlib.suppress(FileExistsError):
        _put_local(Path(path), data, _link)


@contextlib.contextmanager
def whole_file(path: str, *, overwrite: bool) -> Iterator[BinaryIO]:
    """A stream whose content becomes the file at the end, complete or not at all. Raises `FileExistsError` if the file
    exists then and `overwrite` is False."""
    fs, place = resolve(path)
    local, target = isinstance(fs, pafs.LocalFileSystem), Path(place)
    folder = target.parent if local else Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".eagleray-{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not local:
            if not overwrite and exists(fs, place):
                raise FileExistsError(path)
            put(fs, place, temporary)
        elif overwrite:
            temporary.replace(target)
        else:
            _link(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, target: Path) -> None:
    """Gives a file its name. Raises `FileExistsError` if another file has it."""
    try:
        target.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:  # this disk has no hard links
        if target.exists():
            raise FileExistsError(str(target)) from None
        temporary.replace(target)


def _put_local(target: Path, data: Content, name: Callable[[Path, Path], object]) -> None:
    """Writes a temporary file. Then `name(temporary, target)` gives it the name of the target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".eagleray-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            _fill(file, data)
            file.flush()
            os.fsync(file.fileno())
        name(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # so that the rename survives a power failure
    finally:
        os.close(directory)
