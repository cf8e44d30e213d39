"""The emulators of GCS and Azure on loopback, each behind a proxy that refuses a share of the requests.

`python -m tests.support.store_server PORT STORE` is the proxy: pyarrow's client may hold the interpreter's lock while it
waits, so nothing that answers it can be in the process that asks.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx
import pytest

# What each store says where it is busy or errs: by turns.
REFUSALS = {
    "gs": [(code, "application/json", f'{{"error": {{"code": {code}}}}}') for code in (503, 429, 500)],
    "az": [
        (code, "application/xml", f'<?xml version="1.0"?><Error><Code>{name}</Code><Message>busy</Message></Error>')
        for code, name in ((503, "ServerBusy"), (429, "TooManyRequests"), (500, "OperationTimedOut"))
    ],
}
# The emulator of GCS tells wrongly how far an upload is whose piece was refused: it takes them all.
TAKEN = {"gs": "PUT", "az": ""}
AZURITE = Path(sys.prefix) / "azurite" / "node_modules" / ".bin" / "azurite-blob"
ACCOUNT, KEY = "eagleray", base64.b64encode(b"opens nothing but the emulator").decode()


def azurite() -> str:
    """Where Azurite is; skips the test where it is not."""
    found = shutil.which("azurite-blob") or (str(AZURITE) if AZURITE.exists() and shutil.which("node") else None)
    if not found:
        pytest.skip("needs Azurite: npm install -g azurite")
    return found


class Proxy(BaseHTTPRequestHandler):
    """`/~failing/0.5` sets the share that is refused, `/~seen` tells what was asked and refused."""

    protocol_version = "HTTP/1.1"
    port, taken = 0, ""
    refusals: list[tuple[int, str, str]] = []
    failing = 0.0
    random = random.Random(0)
    asked: Counter[str] = Counter()
    refused: Counter[str] = Counter()

    def answer(self) -> None:
        cls = type(self)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.startswith("/~failing/"):
            cls.failing = float(self.path.rpartition("/")[2])
            self.reply(200, {}, b"")
        elif self.path == "/~seen":
            self.reply(200, {}, json.dumps({"asked": self.asked, "refused": self.refused}).encode())
        else:
            self.asked[self.command] += 1
            if self.command != self.taken and self.random.random() < self.failing:
                code, kind, text = self.refusals[self.refused.total() % len(self.refusals)]
                self.refused[str(code)] += 1
                self.reply(code, {"Content-Type": kind}, text.encode())
            else:
                self.forward(body)

    def forward(self, body: bytes) -> None:
        there = http.client.HTTPConnection("127.0.0.1", self.port)
        there.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            there.putheader(name, value)
        there.endheaders(body)
        answer = there.getresponse()
        self.reply(answer.status, dict(answer.getheaders()), answer.read())
        there.close()

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        headers = {name.lower(): value for name, value in headers.items()}
        length = headers.get("content-length", "0") if self.command == "HEAD" else str(len(body))
        for name, value in headers.items():
            if name not in ("connection", "keep-alive", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client has gone
            pass

    def log_message(self, *_: Any) -> None:
        pass


class StoreServer:
    """One bucket, `bucket`. A `failing` share of all requests is refused."""

    store = ""

    def __enter__(self) -> Self:
        self.processes: list[subprocess.Popen[str]] = []
        emulator = self._start(*self.emulator())
        proxy = self._start([sys.executable, "-m", "tests.support.store_server", str(emulator), self.store], {})
        self.port = proxy
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{proxy}", timeout=30)
        self.make()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        for process in reversed(self.processes):
            process.terminate()
            process.wait()

    def _start(self, command: list[str], environment: dict[str, str]) -> int:
        """Starts a server and returns the port that it prints."""
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}, cwd=Path(__file__).parents[2]
        )
        self.processes.append(process)
        assert process.stdout
        for line in process.stdout:
            if found := re.search(r"(?:listens on http://127.0.0.1:|^port )(\d+)", line):
                return int(found[1])
        raise RuntimeError(f"{command} did not start")

    def emulator(self) -> tuple[list[str], dict[str, str]]:
        raise NotImplementedError

    def make(self) -> None:
        raise NotImplementedError

    @property
    def failing(self) -> float:
        return 0.0

    @failing.setter
    def failing(self, share: float) -> None:
        self.http.get(f"/~failing/{share}").raise_for_status()

    def seen(self, what: str) -> Counter[str]:
        return Counter(self.http.get("/~seen").json()[what])

    @property
    def asked(self) -> Counter[str]:
        return self.seen("asked")

    @property
    def refused(self) -> Counter[str]:
        return self.seen("refused")


class GcsServer(StoreServer):
    store = "gs"

    def emulator(self) -> tuple[list[str], dict[str, str]]:
        code = (
            "import threading; from gcp_storage_emulator.server import create_server as create\n"
            "server = create('127.0.0.1', 0, in_memory=True, default_bucket='bucket'); server.start()\n"
            "print('port', server._api._httpd.server_port, flush=True); threading.Event().wait()"
        )
        return [sys.executable, "-c", code], {}

    def make(self) -> None:
        self.environment: dict[str, str] = {}

    def uri(self, key: str) -> str:
        return f"gs://anonymous@bucket/{key}?scheme=http&endpoint_override=127.0.0.1:{self.port}&retry_limit_seconds=3"

    def put(self, key: str, data: bytes) -> None:
        options = {"params": {"uploadType": "media", "name": key}, "headers": {"Content-Type": "text/plain"}}
        self.http.post("/upload/storage/v1/b/bucket/o", content=data, **options).raise_for_status()

    def begin(self, key: str) -> None:
        """An upload that nobody ends."""
        answer = self.http.post("/upload/storage/v1/b/bucket/o", params={"uploadType": "resumable", "name": key})
        part = {"Content-Range": "bytes 0-3/*"}
        self.http.put(answer.headers["Location"], content=b"half", headers=part)

    def objects(self, prefix: str) -> dict[str, bytes]:
        found = self.http.get("/storage/v1/b/bucket/o", params={"prefix": prefix}).json().get("items", [])
        keys = [item["name"] for item in found]
        return {key.removeprefix(prefix): self.http.get(self._path(key), params={"alt": "media"}).content for key in keys}

    def delete(self, key: str) -> None:
        self.http.delete(self._path(key)).raise_for_status()

    def _path(self, key: str) -> str:
        return f"/storage/v1/b/bucket/o/{quote(key, safe='')}"


class AzureServer(StoreServer):
    store = "az"

    def emulator(self) -> tuple[list[str], dict[str, str]]:
        options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
        return [azurite(), "--blobHost", "127.0.0.1", "--blobPort", "0", *options], {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}

    def make(self) -> None:
        from azure.storage.blob import BlobServiceClient

        from pipeline.storage.azure import open_account

        open_account.cache_clear()  # of the server before
        endpoint = f"http://127.0.0.1:{self.port}/{ACCOUNT}"
        connection = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
        self.environment = {"AZURE_STORAGE_CONNECTION_STRING": connection}
        self.container = BlobServiceClient.from_connection_string(connection).create_container("bucket")

    def uri(self, key: str) -> str:
        return f"az://bucket/{key}"

    def put(self, key: str, data: bytes) -> None:
        self.container.upload_blob(key, data)

    def begin(self, key: str) -> None:
        """An upload that nobody ends."""
        self.container.get_blob_client(key).stage_block("aGFsZg==", b"half")

    def objects(self, prefix: str) -> dict[str, bytes]:
        keys = list(self.container.list_blob_names(name_starts_with=prefix))
        return {key.removeprefix(prefix): self.container.download_blob(key).readall() for key in keys}

    def delete(self, key: str) -> None:
        self.container.delete_blob(key)


if __name__ == "__main__":
    Proxy.port, Proxy.refusals, Proxy.taken = int(sys.argv[1]), REFUSALS[sys.argv[2]], TAKEN[sys.argv[2]]
    ThreadingHTTPServer.request_queue_size = 128
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        print("port", server.server_port, flush=True)
        server.serve_forever()
