"""The HTTP client under the remote engines: threads and event loops, proxies, certificates, limits, errors by type."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import http.server
import os
import socket
import socketserver
import ssl
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
from engines.remote.http import MAX_BODY_BYTES, Reply, Transport, target_of
from tests.support.infer import ask
from tests.support.provider_server import ProviderServer

ROOT = Path(__file__).parent.parent
QUIET = {"PYTHONWARNINGS": "always::ResourceWarning"}


@pytest.fixture
def server() -> Iterator[ProviderServer]:
    with ProviderServer() as running:
        yield running


def transport(timeout_s: float = 10.0, connect_timeout_s: float = 5.0, read_timeout_s: float | None = None) -> Transport:
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


@pytest.mark.parametrize("time", [1, 2, 3])
def test_engines_live_and_die_in_200_short_lived_threads(server: ProviderServer, time: int) -> None:
    done = program(THREADS, server.url)
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
    folder = tmp_path_factory.mktemp("certificate")
    file, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
               "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(file)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    return file, context


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
    assert tunnels[0] == (f"localhost:{port}", "Basic dXNlcjpwYXNz")


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


def test_a_broken_encoding_is_a_decoding_error() -> None:
    with (
        answering(lambda handler: say(handler, b"not gzip", content_encoding="gzip")) as port,
        pytest.raises(httpx.DecodingError),
    ):
        get(f"http://127.0.0.1:{port}/")


def test_httpxs_own_client_can_use_it() -> None:
    async def go(port: int) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport()) as client:
            return await client.post(f"http://127.0.0.1:{port}/", json={})

    with answering(lambda handler: say(handler, gzip.compress(b'{"a": 1}'), content_encoding="gzip")) as port:
        assert asyncio.run(go(port)).json() == {"a": 1}


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
    time.sleep(3)


def test_timeouts_say_which_time_was_over() -> None:
    with full_backlog() as port, pytest.raises(httpx.ConnectTimeout):
        get(f"http://127.0.0.1:{port}/", connect_timeout_s=0.3)
    with answering(lambda handler: time.sleep(3)) as port:
        with pytest.raises(httpx.ReadTimeout, match="the whole answer"):
            get(f"http://127.0.0.1:{port}/", timeout_s=0.3)
        with pytest.raises(httpx.ReadTimeout):
            get(f"http://127.0.0.1:{port}/", read_timeout_s=0.3)
    with answering(stall) as port:
        with pytest.raises(httpx.ReadTimeout, match="the whole answer"):
            get(f"http://127.0.0.1:{port}/", timeout_s=0.3)
        with pytest.raises(httpx.ReadTimeout):
            get(f"http://127.0.0.1:{port}/", read_timeout_s=0.3)


def test_a_timeout_of_an_answer_is_told_as_one_and_a_missing_server_as_a_connection() -> None:
    def failed(url: str, **keys: Any) -> str:
        with load_engine("openai_compatible", base_url=url, model="m", max_retries=0, **keys) as engine:
            engine.max_outage_s = 0.0
            (done,) = engine.infer([ask("x")])
            assert done.error is not None
            return done.error.type

    with answering(lambda handler: time.sleep(3)) as port:
        assert failed(f"http://127.0.0.1:{port}", timeout_s=0.3) == "timeout"
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

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Once) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_address[1]}"
        engine: Engine
        with load_engine("openai_compatible", base_url=url, model="m", max_concurrency=4) as engine:
            done = engine.infer([ask(str(i)) for i in range(100)])
        running.shutdown()
    assert [completion.text for completion in done] == ["hi"] * 100
