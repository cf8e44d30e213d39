"""`eagleray serve` and clients that want too much: bodies, media, answers, tries, time."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from aiohttp import web

from tests.support.clusters import standing_cluster
from tests.support.endpoint import Endpoint, start
from tests.support.loopback import LoopbackServer
from tests.support.media_server import MediaServer
from tests.support.processes import PATIENCE_S, family, title, until
from tests.support.provider_server import ProviderServer

pytest.importorskip(
    "ray.serve", reason="Ray Serve is not installed here: pip install 'eagleray[serve]'", exc_type=ImportError
)

UPSTREAM_KEY = "sk-of-the-provider-0123456789"
MOST = 2_000_000
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "required": ["never"]}}}


@pytest.fixture(scope="module")
def provider() -> Iterator[ProviderServer]:
    with ProviderServer() as server:
        yield server


def limited(provider: LoopbackServer, *more: str) -> list[str]:
    """An endpoint in front of the provider that answers two requests at once, and lets few wait."""
    return [
        "engine=openai_compatible", "engine.model=m", f"engine.base_url={provider.url}", "engine.max_concurrency=1",
        "engine.api_key_env=UPSTREAM", f"serve.max_body_bytes={MOST}", "serve.body_timeout_s=10", "serve.max_tokens=50",
        "serve.max_n=3", "serve.max_images=2", "serve.max_queued=2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def endpoint(provider: ProviderServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    running = start(tmp_path_factory.mktemp("limits"), *limited(provider), UPSTREAM=UPSTREAM_KEY)
    yield running
    running.stop()


def ask(endpoint: Endpoint, content: Any = "Hi", **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": content}], **more}
    return endpoint.http.post(f"{endpoint.url}/v1/chat/completions", json=body)


def error_of(reply: httpx.Response, status: int) -> str:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return str(error["message"])


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [({"n": 4}, "n may be at most 3 (serve.max_n)"), ({"n": 10**6}, "n may be at most 3 (serve.max_n)"),
     ({"max_tokens": 51}, "max_tokens may be at most 50 (serve.max_tokens)"),
     ({"max_completion_tokens": 51}, "max_tokens may be at most 50 (serve.max_tokens)"),
     ({"logprobs": True, "top_logprobs": 21}, "logprobs may be at most 20 (serve.max_logprobs)"),
     ({"schema_retries": 3}, "schema_retries may be at most 2 (serve.max_schema_retries)"),
     ({"stop": ["x"] * 65}, "stop may have at most 64 texts of 1,000 characters"),
     ({"stop": "x" * 1001}, "stop may have at most 64 texts of 1,000 characters"),
     ({"user": "u", "chat_template_kwargs": {"enable_thinking": False}, "best_of": 9},
      "there is no field best_of, chat_template_kwargs; engine.extra_body of the server adds fields to requests")],
)  # fmt: skip
def test_a_request_for_more_than_the_keys_allow_is_refused(
    endpoint: Endpoint, provider: ProviderServer, more: dict[str, Any], said: str
) -> None:
    provider.requests.clear()
    assert error_of(ask(endpoint, **more), 400) == said
    assert error_of(ask(endpoint, stream=True, **more), 400) == said
    assert not provider.requests


def test_a_request_without_a_limit_of_its_own_gets_the_servers(endpoint: Endpoint, provider: ProviderServer) -> None:
    provider.requests.clear()
    assert ask(endpoint).status_code == ask(endpoint, max_tokens=7, n=1, user="u").status_code == 200
    assert [seen.body["max_tokens"] for seen in provider.requests] == [50, 7]


@pytest.mark.parametrize(("more", "tries"), [({}, 3), ({"schema_retries": 0}, 1), ({"schema_retries": 1}, 2)])
def test_a_schema_that_nothing_satisfies_costs_so_many_tries(
    endpoint: Endpoint, provider: ProviderServer, more: dict[str, Any], tries: int
) -> None:
    provider.requests.clear()
    assert "is not in the format asked for" in error_of(ask(endpoint, response_format=SCHEMA, **more), 500)
    assert len(provider.requests) == tries


# -- media ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image_url", "audio_url", "video_url", "text"])
@pytest.mark.parametrize(
    ("url", "said"),
    [("{server}/image", "'127.0.0.1' has no public address"), ("http://localhost:{port}/image", "has no public address"),
     ("http://169.254.169.254/latest/meta-data/", "'169.254.169.254' has no public address"),
     ("file:///etc/passwd", "must be at an http(s) or data URL"), ("/etc/passwd", "must be at an http(s) or data URL"),
     ("FILE:///etc/passwd", "must be at an http(s) or data URL"), (" http://x", "must be at an http(s) or data URL"),
     ("ftp://x/y", "must be at an http(s) or data URL")],
)  # fmt: skip
def test_media_come_from_public_addresses_only(
    endpoint: Endpoint, provider: ProviderServer, kind: str, url: str, said: str
) -> None:
    provider.requests.clear()
    with MediaServer() as server:
        key = "image_url" if kind == "text" else kind
        part = {"type": kind, "text": "x", key: {"url": url.format(server=server.url, port=server.port)}}
        assert said in error_of(ask(endpoint, [part]), 400)
        assert not server.hits
    assert not provider.requests


def test_the_number_of_images_is_limited(endpoint: Endpoint) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    assert ask(endpoint, [part] * 2).status_code == 200
    assert error_of(ask(endpoint, [part] * 3), 400) == "a request may have at most 2 images (serve.max_images)"


# -- bodies -----------------------------------------------------------------------------------------------------------


def connect(endpoint: Endpoint, *headers: str) -> socket.socket:
    url = httpx.URL(endpoint.url)
    assert url.port
    found = socket.create_connection((url.host, url.port), timeout=PATIENCE_S)
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json", *headers, "", ""]
    found.sendall("\r\n".join(lines).encode())
    return found


def answer_on(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    return reply.status, json.loads(reply.read())


def proxies(endpoint: Endpoint) -> list[psutil.Process]:
    return [process for process in family(endpoint.process.pid) if "ProxyActor" in title(process)]


def test_a_body_of_ten_gigabytes_is_refused_as_soon_as_its_size_is_known(endpoint: Endpoint) -> None:
    with connect(endpoint, f"Content-Length: {10**10}") as connection:
        status, body = answer_on(connection)
    assert (status, body["error"]["message"]) == (413, "the body has more than 2,000,000 bytes (serve.max_body_bytes)")
    [proxy] = proxies(endpoint)
    before, sent, piece = proxy.memory_info().rss, 0, bytes(1 << 20)
    with connect(endpoint, "Transfer-Encoding: chunked") as connection, contextlib.suppress(ConnectionError):
        while sent < 1 << 30:  # the rest of the ten would change nothing
            connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            sent += len(piece)
    assert sent < 100 << 20
    assert proxy.memory_info().rss - before < 300 << 20
    assert ask(endpoint).status_code == 200


def test_a_body_at_the_limit_is_taken(endpoint: Endpoint) -> None:
    frame = len(json.dumps({"messages": [{"role": "user", "content": ""}]}))
    content = json.dumps({"messages": [{"role": "user", "content": "x" * (MOST - frame)}]}).encode()
    url = f"{endpoint.url}/v1/chat/completions"
    assert endpoint.http.post(url, content=content).status_code == 200
    assert "2,000,000 bytes" in error_of(endpoint.http.post(url, content=content + b" "), 413)


def test_slow_bodies_end_and_take_no_place_in_a_replica(endpoint: Endpoint) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(endpoint, "Content-Length: 1000")) for _ in range(20)]
        assert ask(endpoint).status_code == 200
        ended = set()
        while len(ended) < len(slow):  # a byte now and then, until they are answered
            for connection in set(slow) - ended:
                connection.setblocking(False)
                try:
                    if connection.recv(1, socket.MSG_PEEK):
                        ended.add(connection)
                        continue
                except BlockingIOError:
                    connection.send(b" ")
            time.sleep(0.05)
        for connection in slow:
            connection.setblocking(True)
            status, body = answer_on(connection)
            assert status == 408
            assert body["error"]["message"] == "the body did not arrive within 10 s (serve.body_timeout_s)"


# -- clients that leave -----------------------------------------------------------------------------------------------


@dataclass
class Patient(LoopbackServer):
    """Answers nothing, and counts the requests whose client has gone."""

    asked: int = 0
    left: int = 0
    port: int = 0
    busy: set[Any] = field(default_factory=set)

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        return app

    async def handle(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        self.asked += 1
        while request.transport is not None and not request.transport.is_closing():
            await asyncio.sleep(0.01)
        self.left += 1
        return web.Response()


@pytest.fixture(scope="module")
def patient() -> Iterator[Patient]:
    with Patient() as server:
        yield server


@pytest.fixture(scope="module")
def waiting(patient: Patient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    running = start(tmp_path_factory.mktemp("waiting"), *limited(patient), UPSTREAM=UPSTREAM_KEY)
    yield running
    running.stop()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("header", ["X-Nothing: 1", "X-Request-Disconnect-Disabled: ?1", "x-request-timeout-seconds: -1"])
def test_a_client_that_leaves_ends_its_request(waiting: Endpoint, patient: Patient, streams: bool, header: str) -> None:
    asked, left = patient.asked, patient.left
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": streams}).encode()
    with connect(waiting, f"Content-Length: {len(body)}", header) as connection:
        connection.sendall(body)
        waiting.until(lambda: patient.asked == asked + 1)
        assert patient.left == left
    waiting.until(lambda: patient.left == left + 1)


def test_more_waiting_requests_than_allowed_are_refused(waiting: Endpoint, patient: Patient) -> None:
    asked, left = patient.asked, patient.left
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()
    refused: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        while not refused:
            connection = stack.enter_context(connect(waiting, f"Content-Length: {len(body)}"))
            connection.sendall(body)
            connection.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                status, refused = answer_on(connection)
                assert status == 503
    assert refused["error"]["type"] == "server_error"
    waiting.until(lambda: patient.asked > asked and patient.left - left == patient.asked - asked)


# -- what clients may not see -----------------------------------------------------------------------------------------


def test_a_refused_key_of_the_provider_is_the_servers_own_affair(endpoint: Endpoint, provider: ProviderServer) -> None:
    provider.key = "another"
    try:
        for streams in (False, True):
            reply = ask(endpoint, stream=streams)
            assert error_of(reply, 502) == "the provider behind this endpoint refused the endpoint's API key"
            assert UPSTREAM_KEY not in reply.text
    finally:
        provider.key = None


@pytest.mark.slow
def test_a_lost_replica_is_an_error_in_openais_form(tmp_path: Path) -> None:
    running = start(tmp_path, "engine=echo", "engine.kwargs.crash_text=die")
    try:
        reply = running.post("die")
        assert error_of(reply, 503) == "the replica that had this request died: send it again"
        assert reply.headers["retry-after"] == "1"
        running.until(lambda: running.post("again").status_code == 200)
    finally:
        running.stop()


@pytest.mark.slow
def test_the_front_is_there_on_a_cluster_that_is_joined(provider: ProviderServer, tmp_path: Path) -> None:
    with standing_cluster(4) as env:
        running = start(tmp_path, *limited(provider), UPSTREAM=UPSTREAM_KEY, **env)
        try:
            test_slow_bodies_end_and_take_no_place_in_a_replica(running)
        finally:
            running.stop()
    assert until(lambda: running.process.poll() is not None)
