"""HTTP/1.1 requests over connections of aiohttp's connector.

aiohttp's `ClientSession` makes a dozen objects and a task for each request, which costs as much as all the rest of it. Here
are the parts below it: its connector (DNS, TLS, proxies) and its parser, which is written in C. Idle connections are kept
here, because the connector's pool makes further objects for each request.
"""

from __future__ import annotations

import asyncio
import functools
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_writer import _serialize_headers as serialize_headers
from multidict import CIMultiDict
from yarl import URL

from engines.remote.http_connection import Feed, HTTPConnection, Reply

# Below the 60 s after which most load balancers close a connection that is idle.
IDLE_S = 50.0
# URLs whose routes are kept. An engine asks a few; batches and their files have many.
MOST_ROUTES = 64
# Heads of requests that a route keeps.
MOST_HEADS = 8

_DEFAULT_HEADERS = {"Accept": "*/*", "Accept-Encoding": "gzip", "User-Agent": "eagleray"}


@dataclass(frozen=True, slots=True)
class _Route:
    """The parts of a request that depend on its URL and proxy only."""

    request: aiohttp.ClientRequest  # the address, in the form that the connector takes
    target: str  # of the request line
    headers: CIMultiDict[str]
    idle: deque[HTTPConnection]  # connections to its address, the one that was used last at the end
    heads: dict[tuple[str, ...], bytes] = field(default_factory=dict, repr=False)  # see `head`; they hold secrets

    def head(self, method: str, given: Mapping[str, str]) -> bytes:
        """The request line and the header lines, in the bytes that are sent. Most requests of an engine have the same.

        `Content-Length` is not among them: the connection adds the length of the body.
        Raises `ValueError` for a header that is not valid in HTTP.
        """
        key = (method, *given, *given.values())
        head = self.heads.get(key)
        if head is None:
            headers = self.headers.copy()
            headers.update(given)
            headers.popall("Content-Length", None)
            head = serialize_headers(f"{method} {self.target} HTTP/1.1", headers).removesuffix(b"\r\n")
            if len(self.heads) >= MOST_HEADS:  # a header that differs in each request
                self.heads.clear()
            self.heads[key] = head
        return head

    @classmethod
    def to(cls, url: URL, proxy: URL | None, idle: Mapping[Any, deque[HTTPConnection]]) -> _Route:
        request = aiohttp.ClientRequest("GET", url, proxy=proxy, loop=asyncio.get_running_loop())
        target, headers = url.raw_path_qs, CIMultiDict(_DEFAULT_HEADERS)
        headers["Host"] = request.headers["Host"]
        if proxy is not None and not request.is_ssl():  # RFC 9112, section 3.2.2
            target = str(request.url)
            if proxy.user or proxy.password:
                headers["Proxy-Authorization"] = aiohttp.BasicAuth(proxy.user or "", proxy.password or "").encode()
        return cls(request, target, headers, idle[request.connection_key])


def _no_connection(request: aiohttp.ClientRequest) -> aiohttp.ConnectionTimeoutError:
    return aiohttp.ConnectionTimeoutError(f"no connection to {request.url.origin()} in time")


class Connections:
    """The connections of one event loop."""

    def __init__(self, connector: aiohttp.TCPConnector, timeout: aiohttp.ClientTimeout) -> None:
        self.connector, self.timeout, self.loop = connector, timeout, asyncio.get_running_loop()
        make: type[ResponseHandler] = HTTPConnection
        connector._factory = functools.partial(make, loop=self.loop)
        self.routes: dict[tuple[URL, URL | None], _Route] = {}
        self.idle: defaultdict[Any, deque[HTTPConnection]] = defaultdict(deque)  # by address
        self.sweeper: asyncio.TimerHandle | None = None  # closes connections that are idle for too long
        # When the requests in flight must be answered, the earliest first. All have the same time. One timer serves all:
        # a timer for each would cost as much as sending it.
        self.deadlines: dict[HTTPConnection, float] = {}
        self.watcher: asyncio.TimerHandle | None = None

    def _route(self, url: URL, proxy: URL | None) -> _Route:
        route = self.routes.get((url, proxy))
        if route is None:
            if len(self.routes) >= MOST_ROUTES:
                self.routes.clear()
            route = self.routes[url, proxy] = _Route.to(url, proxy, self.idle)
        return route

    async def send(
        self, method: str, url: URL, proxy: URL | None, headers: Mapping[str, str], content: bytes, feed: Feed | None
    ) -> Reply:
        """Sends one request and reads its whole response. Raises aiohttp's exceptions, `TimeoutError` and `OSError`."""
        route = self._route(url, proxy)
        head = route.head(method, headers)
        connection = self._take_idle(route.idle)
        if connection is None:
            try:
                async with asyncio.timeout(self.timeout.total):
                    connection = await self._connect(route.request)
                    return await self._exchange(connection, route.idle, method, head, content, feed)
            except TimeoutError as error:
                if connection is None:  # nothing was sent
                    raise _no_connection(route.request) from error
                raise
        self._watch(connection)
        try:
            return await self._exchange(connection, route.idle, method, head, content, feed)
        finally:
            self.deadlines.pop(connection, None)

    async def _exchange(
        self,
        connection: HTTPConnection,
        idle: deque[HTTPConnection],
        method: str,
        head: bytes,
        content: bytes,
        feed: Feed | None,
    ) -> Reply:
        try:
            reply = await connection.exchange(method, head, content, feed)
        except BaseException:  # also a cancelled task, and what `feed` raises
            connection.abort()  # no more of the request is sent
            connection.end()
            raise
        if connection.reusable:
            connection.idle_since = self.loop.time()
            idle.append(connection)
            if self.sweeper is None:
                self.sweeper = self.loop.call_later(IDLE_S, self._sweep)
        else:
            connection.end()
        return reply

    async def _connect(self, request: aiohttp.ClientRequest) -> HTTPConnection:
        try:
            lease = await self.connector.connect(request, [], self.timeout)
        except TimeoutError as error:
            raise _no_connection(request) from error
        connection = lease.protocol
        assert isinstance(connection, HTTPConnection)
        connection.lease, connection.read_timeout = lease, self.timeout.sock_read
        return connection

    def _take_idle(self, idle: deque[HTTPConnection]) -> HTTPConnection | None:
        while idle:
            connection = idle.pop()
            if connection.reusable and connection.quiet and connection.idle_since + IDLE_S > self.loop.time():
                return connection
            connection.end()
        return None

    def _sweep(self) -> None:
        oldest = self.loop.time() - IDLE_S
        for idle in self.idle.values():
            while idle and idle[0].idle_since <= oldest:
                idle.popleft().end()
        self.sweeper = self.loop.call_later(IDLE_S, self._sweep) if any(self.idle.values()) else None

    def _watch(self, connection: HTTPConnection) -> None:
        """Ends the request of this connection with `TimeoutError` when its time is over."""
        if self.timeout.total:
            self.deadlines[connection] = self.loop.time() + self.timeout.total
            if self.watcher is None:
                self.watcher = self.loop.call_later(self.timeout.total, self._end_late)

    def _end_late(self) -> None:
        self.watcher = None
        while self.deadlines:
            connection, deadline = next(iter(self.deadlines.items()))
            if deadline > self.loop.time():
                self.watcher = self.loop.call_at(deadline, self._end_late)
                return
            del self.deadlines[connection]
            connection.fail(TimeoutError())

    def close(self) -> None:
        """Gives all connections back to the connector, which is closed."""
        for timer in (self.sweeper, self.watcher):
            if timer is not None:
                timer.cancel()
        for idle in self.idle.values():
            while idle:
                idle.pop().end()
