"""The HTTP client under the remote engines: threads and event loops, proxies, certificates, limits, errors by type."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import http.server
import json
import os
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines import load_engine
from engines.base import Engine
from engines.errors import ConfigError
from engines.remote import http1
from engines.remote.errors import broken
from engines.remote.http import Transport, target_of
from engines.remote.http_connection import MAX_BODY_BYTES, Reply, too_long
from tests.support.http2_server import http2_server
from tests.support.infer import ask
from tests.support.loopback import make_certificate
from tests.support.provider_server import ProviderServer

ROOT = Path(__file__).parent.parent
QUIET = {"PYTHONWARNINGS": "always::ResourceWarning"}


@pytest.fixture
def server() -> Iterator[ProviderServer]:
    with ProviderServer() as running:
        yield running


def transport(timeout_s: float = 60.0, connect_timeout_s: float = 60.0, read_timeout_s: float | None = None) -> Transport:
    return Transport(timeout_s=timeout_s, connect_timeout_s=connect_timeout_s, read_timeout_s=read_timeout_s)


def get(url: str, **keys: Any) -> Reply:
    """One GET by a transport of its own."""

    async def go() -> Reply:
        made = transport(**keys)
        try:
            return await made.send("GET", url, {}, b"")
        finally:
            await made.aclose()

    return asyncio.run(go())


def program(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that asks the server, with every ResourceWarning shown."""
    return subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, env=os.environ | QUIET, capture_output=True,
                          text=True, timeout=300)  # fmt: skip


@contextlib.contextmanager
def answering(reply: Callable[[http.server.BaseHTTPRequestHandler], None], context: ssl.SSLContext | None = None) -> Any:
    """The port of a server of the standard library whose every request `reply` answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            with contextlib.suppress(OSError):
                super().handle_one_request()

        def do_GET(self) -> None:
            reply(self)

        do_POST = do_CONNECT = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass  # a client that refuses our certificate

    with Server(("127.0.0.1", 0), Handler) as running:
        if context is not None:
            running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_port
        running.shutdown()


def say(handler: http.server.BaseHTTPRequestHandler, body: bytes = b"{}", **headers: str) -> None:
    handler.rfile.read(int(handler.headers["content-length"] or 0))
    handler.send_response(200)
    for name, value in {"content-length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    with contextlib.suppress(OSError):
        handler.wfile.write(body)


# -- threads and event loops ----------------------------------------------------------------------------------------------

THREADS = """
import sys, threading
from engines import load_engine
answered = []
def work(i):
    with load_engine("openai_compatible", base_url=sys.argv[1], model="m") as engine:
        done = engine.infer([{"messages": [{"role": "user", "content": f"row {i}"}]}])
        answered.extend(completion.text == f"row {i}" for completion in done)
for start in range(0, 200, 8):
    threads = [threading.Thread(target=work, args=(i,)) for i in range(start, start + 8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
print(sum(answered), "of", len(answered))
"""


POOL = (
    THREADS.partition("for start")[0]
    + """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(16) as pool: list(pool.map(work, range(200)))
print(sum(answered), "of", len(answered))
"""
)

# The parent has an engine with open connections when it forks. The children make their own engines, and some leave with the
# parent's engine still open; the parent's engine goes on.
FORKS = (
    THREADS.partition("for start")[0]
    + """
import os
with load_engine("openai_compatible", base_url=sys.argv[1], model="m") as kept:
    ask = lambda text: kept.infer([{"messages": [{"role": "user", "content": text}]}])[0].text == text
    assert ask("before")
    for child in range(20):
        pid = os.fork()
        if not pid:
            answered.clear()
            for i in range(10): work(i)
            status = 0 if len(answered) == sum(answered) == 10 else 1
            os._exit(status) if child % 2 else sys.exit(status)
        answered.extend([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0] * 10)
        assert ask(f"after {child}")
print(sum(answered), "of", len(answered))
"""
)


@pytest.mark.parametrize("time", range(int(os.environ.get("EAGLERAY_TIMES", "1"))))
@pytest.mark.parametrize("code", [THREADS, POOL, FORKS], ids=["threads", "a thread pool", "forked processes"])
def test_200_engines_live_and_die(server: ProviderServer, code: str, time: int) -> None:
    done = program(code, server.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "200 of 200\n", "")


LOOPS = """
import asyncio, gc, os, sys
from engines import load_engine
from engines.types import to_request
from engines.params import GenerationParams
def ask(engine, i):
    return engine.generate(to_request({"messages": [{"role": "user", "content": str(i)}]}, GenerationParams()))
engine = load_engine("openai_compatible", base_url=sys.argv[1], model="m")
files = []
for i in range(1000):
    if i % 100 == 50:  # a loop that is closed without asyncio.run's care
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(ask(engine, i)).text == str(i)
        for _ in range(3): loop.run_until_complete(asyncio.sleep(0))
        loop.close()
    else:
        assert asyncio.run(ask(engine, i)).text == str(i)
        assert len(engine.transport.sessions) == 1
    if i % 100 in (1, 99):
        gc.collect()
        files.append(len(os.listdir("/proc/self/fd")))
print(files[0] == files[-1] or files)
if sys.argv[2] == "close": engine.close()
"""


@pytest.mark.parametrize("end", ["close", "leave"])
def test_a_thousand_event_loops_leave_nothing_behind(server: ProviderServer, end: str) -> None:
    done = program(LOOPS, server.url, end)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "Unclosed" not in done.stderr
    assert "Traceback" not in done.stderr


EXITS = {
    "inside asyncio.run": "asyncio.run(go())",
    "an idle loop": "loop = asyncio.new_event_loop(); loop.run_until_complete(go())",
    "an idle loop, closed": "loop = asyncio.new_event_loop(); loop.run_until_complete(go()); engine.close(); loop.close()",
    "a loop in a daemon thread": """
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
asyncio.run_coroutine_threadsafe(go(), loop).result(30)
""",
    "closed while its loop runs in a thread": """
loop = asyncio.new_event_loop()
thread = threading.Thread(target=loop.run_forever)
thread.start()
asyncio.run_coroutine_threadsafe(go(), loop).result(30)
engine.close()
async def shut():
    while asyncio.all_tasks(loop) - {asyncio.current_task()}: await asyncio.sleep(0.01)
asyncio.run_coroutine_threadsafe(shut(), loop).result(30)
loop.call_soon_threadsafe(loop.stop); thread.join(); loop.close()
""",
    "closed by a coroutine": "\nasync def all():\n    await go(); engine.close()\nasyncio.run(all())",
    "async with": "\nasync def all():\n    async with engine: await go()\nasyncio.run(all())",
    "dropped": "asyncio.run(go()); del engine",
    "dropped in its loop": """
async def all():
    global engine
    await go(); del engine; gc.collect()
asyncio.run(all())
""",
}
EXIT = """
import asyncio, gc, sys, threading
from engines import load_engine
from engines.types import to_request
from engines.params import GenerationParams
engine = load_engine("openai_compatible", base_url=sys.argv[1], model="m")
async def go():
    done = await engine.generate(to_request({"messages": [{"role": "user", "content": "x"}]}, GenerationParams()))
    print(done.text)
"""


@pytest.mark.parametrize("end", EXITS)
def test_a_program_ends_quietly_however_it_leaves_an_engine(server: ProviderServer, end: str) -> None:
    done = program(EXIT + EXITS[end], server.url)
    said = [line for line in done.stderr.splitlines() if "unclosed event loop" not in line]  # that one is the program's
    assert (done.returncode, done.stdout, said) == (0, "x\n", [])


def test_one_transport_serves_the_loops_of_several_threads_at_once(server: ProviderServer) -> None:
    made = transport()
    statuses: list[int] = []

    async def some(count: int) -> None:
        replies = (made.send("POST", f"{server.url}/v1/chat/completions", {}, b"{}") for _ in range(count))
        statuses.extend(reply.status for reply in await asyncio.gather(*replies))

    threads = [threading.Thread(target=lambda: asyncio.run(some(20))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.close()
    assert statuses == [200] * 320


def test_importing_engines_and_making_a_local_one_loads_no_http_client() -> None:
    code = (
        "import engines, sys; engines.load_engine('echo'); print([m for m in ('aiohttp', 'certifi') if m in sys.modules])"
    )
    assert program(code).stdout == "[]\n"


# -- proxies --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_gets_its_own_credentials_and_no_netrc_is_read(
    variable: str, no_proxies: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[str, str | None, str | None]] = []

    def reply(handler: Any) -> None:
        seen.append((handler.path, handler.headers["proxy-authorization"], handler.headers["authorization"]))
        say(handler)

    (tmp_path / ".netrc").write_text(
        "machine provider.invalid login me password secret\ndefault login me password secret\n"
    )
    (tmp_path / ".netrc").chmod(0o600)
    no_proxies.setenv("HOME", str(tmp_path))
    no_proxies.setenv("NETRC", str(tmp_path / ".netrc"))
    with answering(reply) as port:
        no_proxies.setenv(variable, f"http://user:p%40ss@127.0.0.1:{port}")
        get("http://provider.invalid/v1")
        no_proxies.setenv(variable, f"127.0.0.1:{port}")
        get("http://provider.invalid/v2")
    assert seen == [
        ("http://provider.invalid/v1", f"Basic {base64.b64encode(b'user:p@ss').decode()}", None),
        ("http://provider.invalid/v2", None, None),
    ]


def test_a_proxy_gets_its_credentials_with_every_url_of_a_connection(no_proxies: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str, str | None]] = []

    def reply(handler: Any) -> None:
        seen.append((handler.client_address[1], handler.path, handler.headers["proxy-authorization"]))
        say(handler)

    async def go() -> None:
        made = transport()
        try:
            for path in ("a", "b", "a"):
                await made.send("POST", f"http://provider.invalid/{path}", {}, b"x")
        finally:
            await made.aclose()

    with answering(reply) as port:
        no_proxies.setenv("HTTP_PROXY", f"http://user:p%40ss@127.0.0.1:{port}")
        asyncio.run(go())
    login = f"Basic {base64.b64encode(b'user:p@ss').decode()}"
    connection = seen[0][0]
    assert seen == [(connection, f"http://provider.invalid/{path}", login) for path in ("a", "b", "a")]


@pytest.mark.parametrize(
    ("no_proxy", "url", "through"),
    [("", "http://10.1.2.3/", True), ("10.0.0.0/8", "http://10.1.2.3/", False), ("10.0.0.0/8", "http://11.1.2.3/", True),
     ("example.com", "https://api.example.com/", False), ("example.com", "https://example.org/", True),
     ("example.com:8443", "https://example.com:8443/", False), ("localhost,10.1.2.3", "http://10.1.2.3:8000/", False),
     ("fd00::/8", "http://[fd00::1]:8000/", False), ("*", "http://anything/", False)],
)  # fmt: skip
def test_no_proxy_names_hosts_domains_ports_and_networks(no_proxy: str, url: str, through: bool) -> None:
    proxies = {"http": "http://proxy:1", "https": "http://proxy:1", "no": no_proxy}
    assert (target_of(proxies, url)[2] is not None) == through


def test_a_proxy_of_an_unsupported_kind_is_refused_where_it_would_be_used(no_proxies: pytest.MonkeyPatch) -> None:
    no_proxies.setenv("ALL_PROXY", "socks5://user:secret@127.0.0.1:1080")
    with pytest.raises(ConfigError, match="socks5://.*NO_PROXY") as refused:
        load_engine("openai_compatible", base_url="http://provider.invalid", model="m")
    assert "secret" not in str(refused.value)
    no_proxies.setenv("NO_PROXY", "provider.invalid")
    load_engine("openai_compatible", base_url="http://provider.invalid", model="m").close()


# -- certificates ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for localhost, and a server's context with it."""
    return make_certificate(tmp_path_factory.mktemp("certificate"), "DNS:localhost")


def test_ssl_cert_file_adds_certificates_and_none_is_trusted_without(
    certificate: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, context = certificate
    with answering(say, context) as port:
        with pytest.raises(httpx.ConnectError, match="self-signed certificate"):
            get(f"https://localhost:{port}/")
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        assert get(f"https://localhost:{port}/").status == 200
        with pytest.raises(httpx.ConnectError, match="mismatch"):
            get(f"https://127.0.0.1:{port}/")
    assert len(transport().ssl.get_ca_certs()) > 50  # beside those that everybody trusts


def test_https_goes_through_a_proxy_as_a_tunnel(
    certificate: tuple[Path, ssl.SSLContext], no_proxies: pytest.MonkeyPatch
) -> None:
    file, context = certificate
    tunnels: list[tuple[str, str | None]] = []

    def tunnel(handler: Any) -> None:
        tunnels.append((handler.path, handler.headers["proxy-authorization"]))
        if not handler.headers["proxy-authorization"]:
            handler.send_error(407)
            return
        handler.send_response(200)
        handler.end_headers()
        with socket.create_connection(("127.0.0.1", int(handler.path.rsplit(":", 1)[1]))) as there:
            back = threading.Thread(target=pump, args=(there, handler.connection))
            back.start()
            pump(handler.connection, there)
            back.join()
        handler.close_connection = True

    with answering(say, context) as port, answering(tunnel) as proxy:
        no_proxies.setenv("SSL_CERT_FILE", str(file))
        no_proxies.setenv("HTTPS_PROXY", f"http://user:pass@127.0.0.1:{proxy}")
        assert get(f"https://localhost:{port}/").status == 200
        no_proxies.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy}")
        with pytest.raises(httpx.ConnectError, match="407"):
            get(f"https://localhost:{port}/")
    with answering(lambda handler: handler.send_error(407)) as proxy:
        no_proxies.setenv("HTTPS_PROXY", f"http://user:pass@127.0.0.1:{proxy}")
        with pytest.raises(httpx.ConnectError, match="the proxy answers HTTP 407: ") as refused:
            get("https://localhost:1/")
        assert "pass" not in str(refused.value)
    assert tunnels[0] == (f"localhost:{port}", "Basic dXNlcjpwYXNz")


def test_a_server_that_speaks_only_http2_is_asked_by_http2(
    certificate: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, context = certificate
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    message = {"role": "assistant", "content": "yes"}
    said = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
    with http2_server(context, lambda body: [said[:10], said[10:]]) as server:
        keys = {"model": "m", "base_url": f"https://localhost:{server.port}/v1", "max_concurrency": 16}
        with load_engine("openai_compatible", **keys) as engine:
            found = engine.infer([ask(str(i)) for i in range(50)])
            assert [completion.text for completion in found] == ["yes"] * 50
            assert engine.infer([ask("in another event loop")])[0].text == "yes"
    assert len(server.requests) == 51 and {r[":path"] for r in server.requests} == {"/v1/chat/completions"}
    assert server.requests[0]["user-agent"] == "eagleray" and server.handshakes.count(False) <= 16


def test_without_h2_the_error_names_the_extra_and_no_row_fails_as_a_bug(
    certificate: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, context = certificate
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with http2_server(context, lambda body: [b"{}"]) as server:
        monkeypatch.setitem(sys.modules, "h2", None)  # as if it were not installed
        with load_engine("openai_compatible", model="m", base_url=f"https://localhost:{server.port}/v1") as engine:
            [completion] = engine.infer([ask("x")])
    error = completion.error
    assert error is not None and (error.type, error.scope, error.retryable) == ("bad_request", "run", False)
    assert error.message == "the server speaks HTTP/2 only: pip install 'eagleray[http2]'"


def pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read: No such file"), ("no certificate", "in PEM form")])
def test_a_bad_bundle_is_a_configuration_error(
    content: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "bundle.pem").write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "bundle.pem"))
    with pytest.raises(ConfigError, match=f"SSL_CERT_FILE=.*bundle.pem .*{said}"):
        load_engine("openai_compatible", base_url="http://localhost:1", model="m")


# -- what is sent and what comes back -----------------------------------------------------------------------------------


def test_a_request_says_who_asks_takes_gzip_and_keeps_no_cookie(server: ProviderServer) -> None:
    seen: list[dict[str, str]] = []

    def reply(handler: Any) -> None:
        seen.append({name.lower(): value for name, value in handler.headers.items()})
        say(handler, gzip.compress(b"hello"), content_encoding="gzip", set_cookie="a=b; Path=/")

    async def go(port: int) -> list[Reply]:
        made = transport()
        replies = [await made.send("POST", f"http://me:pw@127.0.0.1:{port}/", {"X-A": "ü"}, b"{}") for _ in range(2)]
        await made.aclose()
        return replies

    with answering(reply) as port:
        first, second = asyncio.run(go(port))
    assert first.content == second.content == b"hello"
    assert first.headers["SET-COOKIE"] == "a=b; Path=/"
    assert seen[0] == seen[1]
    assert seen[0]["user-agent"] == "eagleray"
    assert seen[0]["accept-encoding"] == "gzip"
    assert seen[0]["authorization"] == "Basic bWU6cHc="
    assert "content-type" not in seen[0]


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
def test_a_body_is_bounded_after_decompression(encoding: str) -> None:
    body = bytes(MAX_BODY_BYTES + 1)
    body = gzip.compress(body) if encoding == "gzip" else body
    with (
        answering(lambda handler: say(handler, body, content_encoding=encoding)) as port,
        pytest.raises(httpx.DecodingError, match="longer than 64 MiB"),
    ):
        get(f"http://127.0.0.1:{port}/", timeout_s=60)


@pytest.mark.parametrize("end", [b"", bytes(3)])
def test_an_answer_of_several_gzip_members_comes_whole(end: bytes) -> None:
    body = gzip.compress(b"[1,") + gzip.compress(b"2]") + end
    with answering(lambda handler: say(handler, body, content_encoding="gzip")) as port:
        assert get(f"http://127.0.0.1:{port}/").content == b"[1,2]"


def test_an_answer_of_very_many_gzip_members_is_refused() -> None:
    body = gzip.compress(b"1") * 2000
    with (
        answering(lambda handler: say(handler, body, content_encoding="gzip")) as port,
        pytest.raises(httpx.DecodingError, match="more than 1,000 parts"),
    ):
        get(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    ("encoding", "body"),
    [("gzip", b"not gzip"), ("gzip", gzip.compress(bytes(range(256)))[:-20]), ("br", b"\x0b\x02\x80hello\x03")],
    ids=["not gzip", "cut", "not asked for"],
)
def test_a_broken_encoding_is_a_decoding_error(encoding: str, body: bytes) -> None:
    with (
        answering(lambda handler: say(handler, body, content_encoding=encoding)) as port,
        pytest.raises(httpx.DecodingError),
    ):
        get(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])  # Ray runs workers on uvloop where it is installed
@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_large_bodies_come_whole_and_leave_the_connection_usable(
    secure: bool, loop: str, certificate: tuple[Path, ssl.SSLContext], no_proxies: pytest.MonkeyPatch
) -> None:
    """A large body is read past the parser. A small one follows on the same connection, then a large one again."""
    bodies = [os.urandom(3 << 20), b"small", os.urandom(5 << 20), b""]
    todo, seen = iter(bodies), set()
    run = pytest.importorskip(loop).run

    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        seen.add(handler.client_address[1])
        say(handler, next(todo))

    no_proxies.setenv("SSL_CERT_FILE", str(certificate[0]))

    async def go(port: int) -> list[bytes]:
        made = transport()
        try:
            url = f"{'https' if secure else 'http'}://localhost:{port}/"
            return [bytes((await made.send("POST", url, {}, b"x")).content) for _ in bodies]
        finally:
            await made.aclose()

    with answering(reply, certificate[1] if secure else None) as port:
        assert run(go(port)) == bodies
    assert len(seen) == 1


def test_a_large_body_that_breaks_off_is_a_read_error_and_a_late_one_a_timeout() -> None:
    begun = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n" + bytes(300_000)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            path = self.request.recv(1000).split()[1]
            self.request.sendall(begun)
            if path == b"/late":
                over.wait(60)

    over = threading.Event()
    with tcp_server(Handler) as port:
        with pytest.raises(httpx.ReadError, match="not complete"):
            get(f"http://127.0.0.1:{port}/broken")
        with pytest.raises(httpx.ReadTimeout, match="the whole answer"):
            get(f"http://127.0.0.1:{port}/late", timeout_s=1.5)
        with pytest.raises(httpx.ReadTimeout):
            get(f"http://127.0.0.1:{port}/late", read_timeout_s=0.3)
        over.set()


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1000)
            self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\nto the ")
            self.request.sendall(b"end")

    with tcp_server(Handler) as port:
        assert get(f"http://127.0.0.1:{port}/").content == b"to the end"


def test_httpxs_own_client_can_use_it() -> None:
    """It gives the length of the body itself, which must be in the head only once."""
    lengths: list[str] = []

    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        lengths.extend(handler.headers.get_all("content-length"))
        say(handler, gzip.compress(b'{"a": 1}'), content_encoding="gzip")

    async def go(port: int) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport()) as client:
            return await client.post(f"http://127.0.0.1:{port}/", json={})

    with answering(reply) as port:
        assert asyncio.run(go(port)).json() == {"a": 1}
    assert lengths == ["2"]


# -- errors by type -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_backlog() -> Iterator[int]:
    """The port of a server whose queue of connections is full: the next one waits."""
    with socket.socket() as listening, contextlib.ExitStack() as stack:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        time.sleep(0.1)
        yield listening.getsockname()[1]


def stall(handler: Any) -> None:
    """Half an answer, and then nothing."""
    handler.send_response(200)
    handler.send_header("content-length", "10")
    handler.end_headers()
    handler.wfile.write(b"12345")
    time.sleep(5)


def test_timeouts_say_which_time_was_over() -> None:
    with full_backlog() as port, pytest.raises(httpx.ConnectTimeout):
        get(f"http://127.0.0.1:{port}/", connect_timeout_s=0.3)
    with full_backlog() as port, pytest.raises(httpx.ConnectTimeout):
        get(f"http://127.0.0.1:{port}/", timeout_s=0.3)
    with answering(lambda handler: time.sleep(5)) as port:
        with pytest.raises(httpx.ReadTimeout, match="the whole answer"):
            get(f"http://127.0.0.1:{port}/", timeout_s=1.5)
        with pytest.raises(httpx.ReadTimeout):
            get(f"http://127.0.0.1:{port}/", read_timeout_s=0.3)
    with answering(stall) as port:
        with pytest.raises(httpx.ReadTimeout, match="the whole answer"):
            get(f"http://127.0.0.1:{port}/", timeout_s=1.5)
        with pytest.raises(httpx.ReadTimeout):
            get(f"http://127.0.0.1:{port}/", read_timeout_s=0.3)


def test_the_time_of_each_request_on_an_open_connection_counts() -> None:
    """One timer serves all requests on connections that were open before."""
    stalled: list[float] = []

    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        if handler.path == "/stalls":
            stalled.append(time.monotonic())
            over.wait(60)
        else:
            say(handler)

    async def go(port: int) -> list[float]:
        made = transport(timeout_s=2.0)

        async def ask(path: str) -> float:
            began = time.monotonic()
            if path == "stalls":
                with pytest.raises(httpx.ReadTimeout, match="the whole answer"):
                    await made.send("GET", f"http://127.0.0.1:{port}/{path}", {}, b"")
            else:
                await made.send("GET", f"http://127.0.0.1:{port}/{path}", {}, b"")
            return time.monotonic() - began

        async def later(path: str) -> float:
            await asyncio.sleep(0.2)
            return await ask(path)

        try:
            await asyncio.gather(*(ask("opens") for _ in range(4)))
            return list(await asyncio.gather(ask("stalls"), ask("answers"), later("stalls"), later("answers")))
        finally:
            await made.aclose()

    over = threading.Event()
    with answering(reply) as port:
        waits = asyncio.run(go(port))
        over.set()
    assert len(stalled) == 2
    assert waits[0] >= 2.0
    assert waits[2] >= 2.0


def test_a_connection_that_is_idle_for_long_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "IDLE_S", 0.05)
    closed = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while self.request.recv(1000):
                self.request.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            closed.set()

    async def go(port: int) -> bool:
        made = transport()
        try:
            await made.send("GET", f"http://127.0.0.1:{port}/", {}, b"")
            return await asyncio.to_thread(closed.wait, 60)
        finally:
            await made.aclose()

    with tcp_server(Handler) as port:
        assert asyncio.run(go(port))


def test_a_timeout_of_an_answer_is_told_as_one_and_a_missing_server_as_a_connection() -> None:
    def failed(url: str, **keys: Any) -> str:
        with load_engine("openai_compatible", base_url=url, model="m", max_retries=0, **keys) as engine:
            engine.remote.max_outage_s = 0.0
            (done,) = engine.infer([ask("x")])
            assert done.error is not None
            return done.error.type

    with answering(lambda handler: time.sleep(5)) as port:
        assert failed(f"http://127.0.0.1:{port}", timeout_s=1.5) == "timeout"
        assert failed(f"http://127.0.0.1:{port}", read_timeout_s=0.3) == "timeout"
    with full_backlog() as port:
        assert failed(f"http://127.0.0.1:{port}", connect_timeout_s=0.3) == "connection"
    assert failed(f"http://127.0.0.1:{port}") == "connection"
    assert failed("http://nobody.invalid") == "connection"


def test_a_server_that_is_not_there_or_hangs_up_is_told_apart() -> None:
    with pytest.raises(httpx.ConnectError):
        get("http://nobody.invalid/")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(httpx.ConnectError):
            get(f"http://127.0.0.1:{closed.getsockname()[1]}/")
    with answering(lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)) as port, pytest.raises(httpx.ReadError):
        get(f"http://127.0.0.1:{port}/")
    for url in ("ftp://x/", "http://", "no url"):
        with pytest.raises(httpx.UnsupportedProtocol):
            get(url)


def test_a_header_that_http_does_not_allow_is_refused_without_its_value() -> None:
    async def go(port: int) -> None:
        made = transport()
        try:
            await made.send("GET", f"http://127.0.0.1:{port}/", {"x-key": "secret\r\nx: y"}, b"")
        finally:
            await made.aclose()

    with answering(say) as port, pytest.raises(httpx.UnsupportedProtocol) as refused:
        asyncio.run(go(port))
    assert "secret" not in str(refused.value)
    for headers in ({"x key": "secret"}, {"x-key": "secret\n"}, {"": "secret"}, {"x-key": "secret\x00"}):
        with pytest.raises(ConfigError, match="not valid in HTTP") as error:
            transport().check("http://x", headers)
        assert "secret" not in str(error.value)


def test_a_connection_that_the_server_closed_while_idle_costs_no_row() -> None:
    """The server ends each connection after one answer without saying so, as many do after some idle seconds."""
    body = b'{"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}'

    class Once(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            length = 0
            while line := self.rfile.readline().strip().lower():
                if line.startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            self.rfile.read(length)
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    with tcp_server(Once) as port:
        url = f"http://127.0.0.1:{port}"
        engine: Engine
        with load_engine("openai_compatible", base_url=url, model="m", max_concurrency=4) as engine:
            done = engine.infer([ask(str(i)) for i in range(100)])
    assert [completion.text for completion in done] == ["hi"] * 100


def test_a_connection_that_is_lost_before_the_request_is_sent_is_no_connection(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So its cost is known: nothing."""
    connect = http1.Connections._connect

    async def lost(self: http1.Connections, request: Any) -> Any:
        connection = await connect(self, request)
        connection.transport.close()
        return connection

    monkeypatch.setattr(http1.Connections, "_connect", lost)
    with pytest.raises(httpx.ConnectError, match="before the request was sent"):
        get(server.url)
    assert not server.times


@contextlib.contextmanager
def tcp_server(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    """The port of a server with this handler."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_address[1]
        running.shutdown()


@contextlib.contextmanager
def raw_answers(*answers: bytes) -> Iterator[int]:
    """The port of a server that reads a request of up to 64 KiB and gives the next of `answers`, as it is."""
    todo = iter(answers)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while self.request.recv(1 << 16):
                self.request.sendall(next(todo))

    with tcp_server(Handler) as port:
        yield port


def test_early_hints_are_not_the_answer() -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    with raw_answers(hints + b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi") as port:
        reply = get(f"http://127.0.0.1:{port}/")
    assert (reply.status, reply.content) == (200, b"hi")


def test_what_is_not_http_is_a_read_error() -> None:
    with raw_answers(b"SSH-2.0-OpenSSH_9.2\r\n") as port, pytest.raises(httpx.ReadError, match="not valid HTTP"):
        get(f"http://127.0.0.1:{port}/")

    class First(socketserver.BaseRequestHandler):  # speaks before it is asked
        def handle(self) -> None:
            self.request.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            self.request.recv(1000)

    with tcp_server(First) as port, pytest.raises(httpx.ReadError):
        get(f"http://127.0.0.1:{port}/")
    with (
        raw_answers(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n") as port,
        pytest.raises(httpx.ReadError),
    ):
        get(f"http://127.0.0.1:{port}/")


def test_an_answer_that_comes_before_the_body_is_sent_is_read() -> None:
    """A proxy refuses a body of 20 MB by its head and reads no more of it."""
    refusal = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"

    async def go(port: int) -> Reply:
        made = transport(timeout_s=20)
        try:
            return await made.send("POST", f"http://127.0.0.1:{port}/", {}, bytes(20 << 20))
        finally:
            await made.aclose()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1000)
            self.request.sendall(refusal)
            over.wait(30)

    over = threading.Event()
    with tcp_server(Handler) as port:
        reply = asyncio.run(go(port))
        over.set()
    assert reply.status == 413


def test_a_connection_is_used_again_unless_the_server_ends_it() -> None:
    seen: list[int] = []

    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        seen.append(handler.client_address[1])
        say(handler, **({"connection": "close"} if len(seen) == 3 else {}))

    async def go(port: int) -> None:
        made = transport()
        try:
            for _ in range(5):
                await made.send("POST", f"http://127.0.0.1:{port}/", {}, b"x")
        finally:
            await made.aclose()

    with answering(reply) as port:
        asyncio.run(go(port))
    assert len(seen) == 5
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4]


def test_an_answer_that_no_request_asked_for_answers_no_request() -> None:
    """Here the server answers the first request twice, and the second answer waits in the idle connection."""
    both = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline():
                while self.rfile.readline() not in (b"\r\n", b""):
                    pass
                path = line.split()[1]
                answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(path), path)
                self.wfile.write(answer)
                if path == b"/1":
                    again.wait(10)
                    self.wfile.write(answer)
                    both.set()

    async def go(port: int) -> list[bytes]:
        made = transport()
        try:
            contents = []
            for path in ("1", "2", "3"):
                contents.append((await made.send("GET", f"http://127.0.0.1:{port}/{path}", {}, b"")).content)
                again.set()
                while not both.is_set():
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.01)  # the loop reads what has arrived
            return contents
        finally:
            await made.aclose()

    again = threading.Event()
    with tcp_server(Handler) as port:
        assert asyncio.run(go(port)) == [b"/1", b"/2", b"/3"]


def _contents(port: int, requests: int) -> list[bytes | type[Exception]]:
    """The contents of the answers to requests in turn, or their errors."""

    async def go() -> list[bytes | type[Exception]]:
        made, found = transport(), list[bytes | type[Exception]]()
        try:
            for _ in range(requests):
                try:
                    found.append(bytes((await made.send("GET", f"http://127.0.0.1:{port}/", {}, b"")).content))
                except httpx.HTTPError as error:
                    found.append(type(error))
            return found
        finally:
            await made.aclose()

    return asyncio.run(go())


def test_the_beginning_of_another_answer_does_not_become_the_next_one() -> None:
    ok = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n"
    with raw_answers(ok + b"one" + ok[:20], ok[20:] + b"old" + ok + b"two", ok + b"two") as port:
        assert _contents(port, 3) == [b"one", httpx.ReadError, b"two"]


def test_another_answer_behind_a_large_one_answers_no_request() -> None:
    large, head = bytes(700_000), b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"
    with raw_answers(head % len(large) + large + head % 3 + b"old", head % 3 + b"two") as port:
        assert _contents(port, 2) == [large, b"two"]


def test_an_answer_that_arrived_while_the_loop_was_busy_answers_no_request() -> None:
    """A program that computes between two requests reads neither an answer that no request asked for nor an end."""
    ok = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n"
    late, asked_on, sent = threading.Event(), threading.Event(), threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(ok + (b"two" if late.is_set() else b"one"))
            if not late.is_set():
                late.set()
                asked_on.wait(60)
                self.request.sendall(ok + b"old")
                sent.set()
                self.request.recv(1)

    async def go(port: int) -> list[bytes]:
        made = transport()
        try:
            first = await made.send("GET", f"http://127.0.0.1:{port}/", {}, b"")
            asked_on.set()
            sent.wait(60)  # the event loop stands still
            return [bytes(each.content) for each in (first, await made.send("GET", f"http://127.0.0.1:{port}/", {}, b""))]
        finally:
            await made.aclose()

    with tcp_server(Handler) as port:
        assert asyncio.run(go(port)) == [b"one", b"two"]


@pytest.mark.parametrize("status, whole", [(200, False), (503, True)])
def test_a_body_without_a_length_is_whole_at_the_end_of_the_connection_and_not_at_its_reset(
    status: int, whole: bool
) -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(b"HTTP/1.1 %d X\r\n\r\nhalf of it" % status)
            time.sleep(0.2)  # a reset drops what the client has not read
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()

    with tcp_server(Handler) as port:
        assert _contents(port, 1) == [b"half of it" if whole else httpx.ReadError]


@pytest.mark.parametrize("answer", [b"HTTP/1.1 413 X\r\n\r\ntoo large", b""])
def test_an_end_while_the_body_is_sent_is_noticed_at_once(answer: bytes) -> None:
    over = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1000)
            self.request.sendall(answer)
            self.request.shutdown(socket.SHUT_WR)
            over.wait(120)

    async def go(port: int) -> bytes | type[Exception]:
        made = transport(timeout_s=120)
        try:
            async with asyncio.timeout(60):
                return bytes((await made.send("POST", f"http://127.0.0.1:{port}/", {}, bytes(20 << 20))).content)
        except httpx.HTTPError as error:
            return type(error)
        finally:
            over.set()
            await made.aclose()

    with tcp_server(Handler) as port:
        assert asyncio.run(go(port)) == (b"too large" if answer else httpx.ReadError)


def test_an_answer_that_is_too_long_is_not_asked_for_again() -> None:
    error = broken(too_long())
    assert (error.type, error.retryable) == ("bad_response", False)
    assert "longer than 64 MiB" in str(error)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("answer", [b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n", b""])
def test_a_connection_with_an_unsent_body_is_ended_and_not_used_again(
    answer: bytes, scheme: str, certificate: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server reads only the head of the first request. It refuses the request, or the client gives up."""
    file, context = certificate
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    over, ended = threading.Event(), threading.Event()
    got: list[int] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if scheme == "https":
                self.request = context.wrap_socket(self.request, server_side=True)
            if not self.request.recv(1000).startswith(b"POST /first "):
                self.request.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                return
            self.request.sendall(answer)
            over.wait(60)
            with contextlib.suppress(OSError):
                while piece := self.request.recv(1 << 20):
                    got.append(len(piece))
            ended.set()

    async def go(port: int) -> int:
        made = transport(timeout_s=60.0 if answer else 5.0)
        url = f"{scheme}://localhost:{port}"
        try:
            if answer:
                assert (await made.send("POST", f"{url}/first", {}, bytes(20 << 20))).status == 413
            else:
                with pytest.raises(httpx.ReadTimeout):
                    await made.send("POST", f"{url}/first", {}, bytes(20 << 20))
            status = (await made.send("POST", f"{url}/second", {}, b"x")).status
            over.set()
            assert await asyncio.to_thread(ended.wait, 60)
            return status
        finally:
            over.set()
            await made.aclose()

    with tcp_server(Handler) as port:
        assert asyncio.run(go(port)) == 200
    assert sum(got) < 19 << 20  # without the end of the body


def test_the_time_in_which_a_body_is_sent_is_not_time_without_data() -> None:
    """The server waits longer than `read_timeout_s` before it reads the body; then it answers at once."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            head = self.request.recv(1 << 16).partition(b"\r\n\r\n")
            todo = (40 << 20) - len(head[2])
            time.sleep(4)
            while todo:
                todo -= len(self.request.recv(1 << 20))
            self.request.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    async def go(port: int) -> int:
        made = transport(read_timeout_s=3)
        try:
            return (await made.send("POST", f"http://127.0.0.1:{port}/", {}, bytes(40 << 20))).status
        finally:
            await made.aclose()

    with tcp_server(Handler) as port:
        assert asyncio.run(go(port)) == 200
