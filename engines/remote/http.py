"""One HTTP client for all requests: aiohttp's connections, httpx's exceptions.

httpx's own connection pool collapses at a few hundred requests in flight. aiohttp's does not, but it belongs to one event
loop, and an engine may be used from several: `Transport` keeps one pool for each running loop.

Proxies come from HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, further CA certificates from SSL_CERT_FILE. `~/.netrc` is
not read: it may hold credentials for other programs.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import ipaddress
import os
import re
import socket
import ssl
import urllib.request
import weakref
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import certifi
import httpx
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError
from yarl import URL

from engines.errors import ConfigError
from engines.remote import http1, http2
from engines.remote.http_connection import Feed, Reply

# A NAT or load balancer forgets a connection that is silent while a long answer is generated.
KEEPALIVE_PROBE_S = 60

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NO_HEADER_VALUE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

# One event loop's session, and the generator that opened it and closes it.
_Opened = tuple["_Clients", AsyncGenerator["_Clients", None]]
_Sessions = dict[asyncio.AbstractEventLoop, _Opened]
# Generators that their running loop was told to end. A loop that ends first still finds them here, and ends them itself.
_closing: dict[AsyncGenerator[_Clients, None], asyncio.AbstractEventLoop] = {}


@dataclass(slots=True)
class _Clients:
    """The HTTP clients of one event loop."""

    http1: http1.Connections
    http2: dict[URL | None, httpx.AsyncClient] = field(default_factory=dict)  # by proxy; only for servers that want it


class Transport(httpx.AsyncBaseTransport):
    """Sends requests and reads the whole response. Raises httpx's exceptions. May be used from any thread and loop.

    The engine calls `send` with plain values: making httpx's objects costs as much as the request itself.
    """

    def __init__(self, *, timeout_s: float, connect_timeout_s: float, read_timeout_s: float | None) -> None:
        self.timeout = aiohttp.ClientTimeout(total=timeout_s, connect=connect_timeout_s, sock_read=read_timeout_s)
        self.ssl = ssl_context(os.environ.get("SSL_CERT_FILE"))
        self.proxies = urllib.request.getproxies_environment()
        self.target = functools.lru_cache(64)(functools.partial(target_of, self.proxies))
        self.sessions: _Sessions = {}
        self.http2_servers: set[URL] = set()
        # Also closes the sessions of a transport that is dropped, or still there when the interpreter ends.
        self.close = weakref.finalize(self, _close_sessions, self.sessions)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """For `httpx.AsyncClient(transport=…)`."""
        reply = await self.send(request.method, str(request.url), dict(request.headers), await request.aread())
        decoded = ("content-encoding", "content-length", "transfer-encoding")
        headers = [(name, value) for name, value in reply.headers.items() if name.lower() not in decoded]
        return httpx.Response(reply.status, headers=headers, content=bytes(reply.content))

    async def aclose(self) -> None:
        if opened := self.sessions.pop(asyncio.get_running_loop(), None):
            await opened[1].aclose()
        self.close()

    async def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        content: bytes,
        feed: Feed | None = None,
    ) -> Reply:
        """Sends one request and reads its whole response. Raises httpx's exceptions.

        `feed` gets the body of a stream of events piece by piece, as the pieces arrive.
        """
        opened = self.sessions.get(asyncio.get_running_loop())
        clients = opened[0] if opened else await self._open()
        try:
            place, credentials, proxy = self.target(url)
            if credentials and not any(name.lower() == "authorization" for name in headers):
                headers = {**headers, "authorization": credentials}
            if self.http2_servers and place.origin() in self.http2_servers:
                client = self._http2_client(clients, proxy)
                request = client.build_request(method, str(place), headers=dict(headers), content=content)
                return await self._send_http2(client, request, feed)
            return await clients.http1.send(method, place, proxy, headers, content, feed)
        except aiohttp.ClientConnectorError as error:
            if not http2.is_wanted(error):
                raise _translated(error) from None
            self.http2_servers.add(place.origin())
            return await self.send(method, url, headers, content, feed)
        except (aiohttp.ClientError, HttpProcessingError, TimeoutError, OSError) as error:
            raise _translated(error) from None
        except ValueError:  # its text may hold the value of a header, which may be a secret
            raise httpx.UnsupportedProtocol("the request's URL or one of its headers is not valid in HTTP") from None

    def _http2_client(self, clients: _Clients, proxy: URL | None) -> httpx.AsyncClient:
        if proxy not in clients.http2:
            context = new_ssl_context(os.environ.get("SSL_CERT_FILE"))
            clients.http2[proxy] = http2.client(self.timeout, context, str(proxy) if proxy else None)
        return clients.http2[proxy]

    async def _send_http2(self, client: httpx.AsyncClient, request: httpx.Request, feed: Feed | None) -> Reply:
        async with asyncio.timeout(self.timeout.total):
            response = await client.send(request, stream=True)
            try:
                body = await http2.read_body(response, feed)
            finally:
                await response.aclose()
        return Reply(response.status_code, response.headers, body)

    async def _open(self) -> _Clients:
        """The clients of the running loop."""
        loop = asyncio.get_running_loop()
        for other in list(self.sessions):
            if other.is_closed():
                _close_session(other, self.sessions.pop(other, None))
        # The loop itself closes the session at its end: `asyncio.run` ends the asynchronous generators of its loop.
        generator = _session(self.timeout, self.ssl)
        clients = await anext(generator)
        self.sessions[loop] = clients, generator
        return clients

    def check(self, url: str, headers: Mapping[str, str]) -> None:
        """Raises `ConfigError` for what HTTP does not allow. It does not name header values, which may be secrets."""
        for name, value in headers.items():
            if not _HEADER_NAME.fullmatch(name) or _NO_HEADER_VALUE.search(value):
                raise ConfigError(f"the header {name!r} or its value is not valid in HTTP", key="engine.headers")
        try:
            self.target(url)
        except ValueError:
            raise ConfigError(f"engine.base_url: {url!r} is not a URL", key="engine.base_url") from None


async def _session(timeout: aiohttp.ClientTimeout, context: ssl.SSLContext) -> AsyncGenerator[_Clients, None]:
    connector = aiohttp.TCPConnector(
        limit=0,  # the engine bounds what is in flight
        ssl=context,
        resolver=aiohttp.ThreadedResolver(),  # not c-ares where aiodns happens to be installed
        socket_factory=_socket,
    )
    clients = _Clients(http1.Connections(connector, timeout))
    try:
        async with connector:
            try:
                yield clients
            finally:
                for client in clients.http2.values():
                    await client.aclose()
    finally:
        clients.http1.close()


def _socket(address: tuple) -> socket.socket:
    made = socket.socket(address[0], address[1], address[2])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_PROBE_S)
    return made


def _close_sessions(sessions: _Sessions) -> None:
    while sessions:
        with contextlib.suppress(KeyError):  # another thread took the last one
            _close_session(*sessions.popitem())


def _close_session(loop: asyncio.AbstractEventLoop, opened: _Opened | None) -> None:
    """Closes a session from any thread. A loop that runs does it by itself, and is not waited for: it may wait for us."""
    if opened is None:
        return
    _, generator = opened
    with contextlib.suppress(RuntimeError):  # the loop ends at this moment, and closes the session itself
        if loop.is_closed():  # nothing to wait for: one step ends it
            with contextlib.suppress(StopIteration):
                generator.aclose().__await__().send(None)
        elif loop.is_running() or asyncio._get_running_loop() is not None:
            for other in [other for other, its in list(_closing.items()) if its.is_closed()]:
                _closing.pop(other, None)
            _closing[generator] = loop
            loop.call_soon_threadsafe(lambda: asyncio.ensure_future(_aclose(generator), loop=loop))
        else:
            loop.run_until_complete(generator.aclose())


async def _aclose(generator: AsyncGenerator[_Clients, None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop's end closes it at the same time
        await generator.aclose()
    _closing.pop(generator, None)


def ssl_context(bundle: str | None) -> ssl.SSLContext:
    """Trusts certifi's certificates, the system's, and those in the file `bundle`. Raises `ConfigError`."""
    try:
        return _ssl_context(bundle, Path(bundle).stat().st_mtime_ns if bundle else 0)
    except ssl.SSLError:
        raise ConfigError(f"SSL_CERT_FILE={bundle} holds no certificate in PEM form") from None
    except OSError as error:
        raise ConfigError(f"SSL_CERT_FILE={bundle} cannot be read: {error.strerror}") from None


@functools.lru_cache(4)  # it takes 20 ms to make, and there may be an engine in each thread of a server
def _ssl_context(bundle: str | None, changed_ns: int) -> ssl.SSLContext:
    return new_ssl_context(bundle)


def new_ssl_context(bundle: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_default_certs()
    if bundle:
        context.load_verify_locations(cafile=bundle)
    context.set_alpn_protocols(["http/1.1"])
    return context


def target_of(proxies: Mapping[str, str], url: str) -> tuple[URL, str | None, URL | None]:
    """The target of a request: its URL without credentials, the credentials as the header Authorization, and the proxy.

    `proxies` are those of `urllib.request.getproxies_environment`. Raises `ValueError` and `ConfigError`.
    """
    place = URL(url)
    host = place.host
    if place.scheme not in ("http", "https") or not host:
        raise ValueError(url)
    credentials = None
    if place.user:
        pair = f"{place.user}:{place.password or ''}".encode()
        credentials, place = f"Basic {base64.b64encode(pair).decode()}", place.with_user(None)
    found = proxies.get(place.scheme) or proxies.get("all")
    if not found or _bypassed(host, place.port, proxies):
        return place, credentials, None
    proxy = URL(found if "://" in found else f"http://{found}")
    if proxy.scheme not in ("http", "https"):
        raise ConfigError(
            f"{host} would be reached through a proxy of the kind {proxy.scheme}:// (from the environment), which is "
            "not supported: set HTTPS_PROXY and HTTP_PROXY to an http:// proxy, or add the host to NO_PROXY"
        )
    return place, credentials, proxy


def _bypassed(host: str, port: int | None, proxies: Mapping[str, str]) -> bool:
    """True if NO_PROXY names the host: itself, a domain above it, with a port, an address or a network (10.0.0.0/8)."""
    if urllib.request.proxy_bypass_environment(f"{host}:{port}", dict(proxies)):  # type: ignore[attr-defined]
        return True
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        for part in proxies.get("no", "").split(","):
            with contextlib.suppress(ValueError):
                if address in ipaddress.ip_network(part.strip(), strict=False):
                    return True
    return False


def _translated(error: Exception) -> httpx.RequestError:
    """httpx's exception for one of aiohttp's, by which `engines.remote.errors` decides what to do."""
    said = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ClientResponseError):  # its text has the URL, for a proxy with the password
        said = f"HTTP {error.status}: {error.message}"
    if isinstance(error, HttpProcessingError):
        said = f"the answer is not valid HTTP: {error.message}"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return httpx.ConnectError(f"the proxy answers {said}")
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return httpx.ConnectTimeout(said)
    if isinstance(error, TimeoutError):
        return httpx.ReadTimeout(str(error) or "the time for the whole answer is over")
    # The second: the connection was lost before anything was sent.
    if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ClientConnectionResetError)):
        return httpx.ConnectError(said)
    if isinstance(error, aiohttp.InvalidURL):
        return httpx.UnsupportedProtocol(said)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ContentEncodingError):
            return httpx.DecodingError(cause.message)
        cause = cause.__cause__
    return httpx.ReadError(said)
