"""Files on any store: maps a path or URI to a pyarrow filesystem and the path inside it."""

from __future__ import annotations

import contextlib
import functools
import os
import posixpath
import re
import urllib.parse
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from pyarrow import fs as pafs

from engines.errors import ConfigError
from engines.text import one_line
from pipeline.storage.retry import patiently

# Schemes of pyarrow's own clients, and of our Azure client. Every other scheme goes through fsspec.
_NATIVE = ("s3", "gs", "gcs")
_AZURE = ("az", "abfs", "abfss")
_URI = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/{2}(.*)$", re.DOTALL)
# "?endpoint_override=…" after an s3:// path, or a signature after an https:// URL. A bare "?" is a glob character.
_OPTIONS = re.compile(r"\?[\w-]+=[^/].*$")
GLOB = re.compile(r"[*?\[]")
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
        raise ConfigError(f"{scheme}://…@… holds credentials: keep them in the environment, not in a path")
    if scheme in _AZURE:
        if options:
            raise ConfigError(f"{scheme}:// takes no ?…: the account and its credentials come from the environment")
        container, _, host = bucket.partition("@")
        return _azure(scheme, host), f"{container}{rest[len(bucket) :]}".rstrip("/")
    user = bucket[: bucket.rfind("@") + 1]
    return _native(f"{scheme}://{bucket}{options}"), rest.removeprefix(user).rstrip("/")


def split_options(path: str) -> tuple[str, str]:
    """Splits `s3://bucket/key?region=…` into `("s3://bucket/key", "?region=…")`."""
    options = _OPTIONS.search(path)
    return (path[: options.start()], options[0]) if options else (path, "")


def canonical_place(path: str) -> str:
    """The same text for every spelling of a path, glob or URI. Links on disks are followed; options and credentials of a
    URI are dropped. Sends no request to a store."""
    return posixpath.join(*split_glob(path)).rstrip("/") or "/"


def split_glob(path: str) -> tuple[str, str]:
    """The canonical place of a path, or of the directory that a glob searches; and the rest of the glob."""
    uri = _URI.match(path)
    local = not uri or uri[1].lower() == "file"
    place = resolve(path)[1] if local else _canonical_uri(path)
    # The name of a file may contain glob characters. On a store, finding out would need a request.
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
    elif "retry_limit_seconds=" not in bucket:  # the default is 15 minutes, in which a run could not stop
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
        raise ConfigError(f"{scheme}:// needs a package that is not installed: {one_line(error)}") from None
    except ValueError:
        raise ConfigError(f"nothing here reads '{scheme}://' paths: {path!r:.200}") from None
    except Exception as error:  # each fsspec implementation raises its own types (no route, no credentials, …)
        raise ConfigError(f"cannot open {scheme}://: {one_line(error)}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), inner


def info_of(fs: pafs.FileSystem, path: str) -> pafs.FileInfo:
    """The type, size and time of a path. A missing path has the type NotFound."""
    return patiently(lambda: fs.get_file_info(path))


def exists(fs: pafs.FileSystem, path: str) -> bool:
    """True if there is a file or directory at `path`."""
    return bool(info_of(fs, path).type != pafs.FileType.NotFound)


def listing(fs: pafs.FileSystem, directory: str) -> list[pafs.FileInfo]:
    """The direct children of a directory. Empty if the directory does not exist."""
    return patiently(lambda: fs.get_file_info(pafs.FileSelector(directory, allow_not_found=True)))


def remove(fs: pafs.FileSystem, path: str) -> None:
    """Deletes a file. A missing file is no error: an earlier try may have deleted it before the store failed."""

    def delete() -> None:
        with contextlib.suppress(FileNotFoundError):
            fs.delete_file(path)

    patiently(delete)


def abort_uploads(path: str, ours: Callable[[str], bool]) -> None:
    """Aborts multipart uploads below an s3:// path that killed writers left unfinished. Such uploads are in no listing, and
    the store charges for them. `ours` says for a key, relative to `path`, if Eagleray started its upload.

    Does nothing on other stores or without boto3: use a lifecycle rule of the bucket there.
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


def write_atomic(fs: pafs.FileSystem, path: str, data: bytes) -> None:
    """Writes a file so that no reader sees a part of it. Creates missing parent directories."""
    if not isinstance(fs, pafs.LocalFileSystem):
        if isinstance(fs, pafs.PyFileSystem) and posixpath.dirname(path):
            fs.create_dir(posixpath.dirname(path), recursive=True)

        def put() -> None:  # an object appears complete when the stream closes, so no temporary name is needed
            with fs.open_output_stream(path, compression=None) as stream:
                stream.write(data)

        patiently(put)
        return
    _put_local(Path(path), data, lambda temporary, target: temporary.replace(target))


def write_if_absent(fs: pafs.FileSystem, path: str, data: bytes) -> None:
    """As `write_atomic`, but keeps a file that is there. On a disk, of two writers exactly one writes. A store may have no
    such operation: there, the second of two writers at the same moment replaces the file."""
    if isinstance(fs, pafs.LocalFileSystem):
        _put_local(Path(path), data, _link)
    elif not exists(fs, path):
        write_atomic(fs, path, data)


def _link(temporary: Path, target: Path) -> None:
    try:
        target.hardlink_to(temporary)
    except FileExistsError:
        pass
    except OSError:  # this disk has no hard links
        if not target.exists():
            temporary.replace(target)


def _put_local(target: Path, data: bytes, name: Callable[[Path, Path], object]) -> None:
    """Writes a temporary file, and calls `name` to give it its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".eagleray-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
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
