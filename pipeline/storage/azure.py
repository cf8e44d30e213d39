"""Azure blobs as a pyarrow filesystem. An object appears only when it is complete; pyarrow's own Azure filesystem creates
an empty object first."""

from __future__ import annotations

import errno
import functools
import io
import os
import posixpath
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pyarrow as pa
from azure.core.exceptions import AzureError, HttpResponseError, ResourceNotFoundError
from azure.storage.blob import BlobBlock, BlobClient, BlobServiceClient
from pyarrow import fs as pafs

from engines.errors import ConfigError
from engines.text import one_line
from pipeline.storage.retry import patiently

# A failed request is repeated for up to this many seconds. The client's own retries are off: it waits 15 s before the first
# retry, and it does not retry HTTP 429.
CLIENT_S = 10.0
BLOCK = 32 << 20  # bytes of one request; longer data takes several requests

T = TypeVar("T")


@functools.lru_cache(maxsize=32)
def open_account(host: str) -> pafs.FileSystem:
    """The containers of `ACCOUNT.dfs.core.windows.net`, or of the account in the environment if `host` is empty. Raises
    `ConfigError` if the account cannot be opened."""
    try:
        return pafs.PyFileSystem(Blobs(_service(host)))
    except (AzureError, ImportError, ValueError) as error:
        raise ConfigError(f"cannot open the Azure account {host or 'of the environment'}: {one_line(error)}") from None


def _service(host: str) -> BlobServiceClient:
    connection = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    account = host.split(".", 1)[0]
    if connection and (not account or f"AccountName={account};" in connection + ";"):
        return BlobServiceClient.from_connection_string(connection, retry_total=0)
    if not host:
        account = os.environ.get("AZURE_STORAGE_ACCOUNT", "")
        host = f"{account}.blob.core.windows.net"
    if not account:
        raise ConfigError(
            "az:// and abfs:// need an account: AZURE_STORAGE_ACCOUNT or AZURE_STORAGE_CONNECTION_STRING in the environment"
            ", or abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/…"
        )
    credential: Any = os.environ.get("AZURE_STORAGE_KEY") or os.environ.get("AZURE_STORAGE_SAS_TOKEN")
    if not credential:
        from azure.identity import DefaultAzureCredential

        credential = DefaultAzureCredential()
    return BlobServiceClient(f"https://{host.replace('.dfs.', '.blob.')}", credential, retry_total=0)


def _call_store(work: Callable[[], T]) -> T:
    """Calls the store, repeats passing failures, and raises the store's errors as `OSError`."""

    def attempt() -> T:
        try:
            return work()
        except ResourceNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, one_line(error)) from None
        except HttpResponseError as error:
            raise OSError(f"Azure Error HTTP {error.status_code}: {one_line(error)}") from None
        except AzureError as error:  # there was no HTTP response
            raise OSError(f"Azure Error {type(error).__name__}: {one_line(error)}") from None

    return patiently(attempt, CLIENT_S)


class Blobs(pafs.FileSystemHandler):
    """The containers of an account. The first part of a path is the container. A directory exists if it has objects."""

    def __init__(self, service: BlobServiceClient) -> None:
        self.service = service

    def _blob(self, path: str) -> BlobClient:
        container, _, name = path.partition("/")
        return self.service.get_blob_client(container, name)

    def _blobs_below(self, directory: str, recursive: bool, **options: Any) -> Iterator[Any]:
        container, _, name = directory.partition("/")
        client = self.service.get_container_client(container)
        prefix = f"{name}/" if name else ""
        if recursive:
            return iter(client.list_blobs(prefix, include=["metadata"], **options))
        return iter(client.walk_blobs(prefix, include=["metadata"], **options))

    def get_type_name(self) -> str:
        return "azure"

    def normalize_path(self, path: str) -> str:
        return path.rstrip("/")

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> pafs.FileInfo:
        if "/" in path:
            try:
                return _blob_info(path, _call_store(self._blob(path).get_blob_properties))
            except FileNotFoundError:
                pass
        try:
            first_blob = _call_store(lambda: next(self._blobs_below(path, True, results_per_page=1), None))
        except FileNotFoundError:  # no such container
            first_blob = None
        return pafs.FileInfo(path, pafs.FileType.Directory if first_blob else pafs.FileType.NotFound)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        base = selector.base_dir.rstrip("/")
        try:
            blobs = _call_store(lambda: list(self._blobs_below(base, selector.recursive)))
        except FileNotFoundError:
            blobs = []
        if not blobs and not selector.allow_not_found:
            raise FileNotFoundError(errno.ENOENT, "no such directory", base)
        container = base.partition("/")[0]
        found: dict[str, pafs.FileInfo] = {}
        for blob in blobs:
            path = f"{container}/{blob.name}".rstrip("/")
            info = _blob_info(path, blob) if "size" in blob else pafs.FileInfo(path, pafs.FileType.Directory)
            if not (blob.name.endswith("/") and info.is_file):  # another client's marker of a directory
                found[path] = info
            while len(path := posixpath.dirname(path)) > len(base):
                found.setdefault(path, pafs.FileInfo(path, pafs.FileType.Directory))
        found.pop(base, None)
        return list(found.values())

    def open_input_file(self, path: str) -> pa.PythonFile:
        blob = self._blob(path)
        info = _blob_info(path, _call_store(blob.get_blob_properties))
        if not info.is_file:
            raise IsADirectoryError(errno.EISDIR, "is a directory", path)
        return pa.PythonFile(_Reader(blob, info.size), mode="r")

    open_input_stream = open_input_file

    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        return pa.PythonFile(_Writer(self._blob(path)), mode="w")

    def delete_file(self, path: str) -> None:
        _call_store(self._blob(path).delete_blob)

    def create_dir(self, path: str, recursive: bool) -> None:
        """Does nothing: Azure stores no directories, only blobs."""

    def _unsupported(self, *_: Any) -> None:
        raise NotImplementedError

    delete_dir = delete_dir_contents = delete_root_dir_contents = move = copy_file = open_append_stream = _unsupported


def _blob_info(path: str, blob: Any) -> pafs.FileInfo:
    if (blob.metadata or {}).get("hdi_isfolder") == "true":  # an account with a hierarchical namespace
        return pafs.FileInfo(path, pafs.FileType.Directory)
    return pafs.FileInfo(path, pafs.FileType.File, size=blob.size, mtime=blob.last_modified)


class _Reader(io.RawIOBase):
    def __init__(self, blob: BlobClient, size: int) -> None:
        self.blob, self.size, self.at = blob, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        start, stop = self.at, min(self.at + len(buffer), self.size)
        for at in range(start, stop, BLOCK):
            length = min(BLOCK, stop - at)
            buffer[at - start : at - start + length] = _call_store(functools.partial(self._read, at, length))
            self.at = at + length
        return self.at - start

    def _read(self, at: int, length: int) -> bytes:
        return bytes(self.blob.download_blob(at, length).readall())


class _Writer(io.BytesIO):
    """Uploads the object on close: in one request, or in blocks that the last request commits as one object."""

    def __init__(self, blob: BlobClient) -> None:
        super().__init__()
        self.blob = blob

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            if len(data) <= BLOCK:
                _call_store(lambda: self.blob.upload_blob(data, overwrite=True))
                return
            blocks = {f"{at:020}": data[at : at + BLOCK] for at in range(0, len(data), BLOCK)}
            for name, block in blocks.items():
                _call_store(functools.partial(self.blob.stage_block, name, block))
            _call_store(lambda: self.blob.commit_block_list([BlobBlock(name) for name in blocks]))
