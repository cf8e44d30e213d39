"""httpx's API over reqwest (Rust): httpx's own connection pool collapses at a few hundred requests in flight.

The engine calls the transport directly, without `httpx.AsyncClient`: cookies, redirects and event hooks are not wanted
here, and cost as much as the request itself. `httpx.AsyncClient(transport=Transport(…))` works too. Proxies come from
HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, a CA bundle from SSL_CERT_FILE.
"""

from __future__ import annotations

import atexit
import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx
from pyreqwest import exceptions
from pyreqwest.client import Client, ClientBuilder

from engines.errors import ConfigError

# A longer answer is none: it would fill the memory of a worker with hundreds in flight.
MAX_BODY_BYTES = 64 << 20

_ERRORS: tuple[tuple[type[Exception], type[httpx.RequestError]], ...] = (
    (exceptions.ConnectTimeoutError, httpx.ConnectTimeout),
    (exceptions.RequestTimeoutError, httpx.ReadTimeout),
    (exceptions.ConnectError, httpx.ConnectError),
    (exceptions.DecodeError, httpx.DecodingError),
    (exceptions.RequestError, httpx.ReadError),
)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole response; the names in `headers` are matched in any case."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Transport(httpx.AsyncBaseTransport):
    """Sends `httpx.Request`s and reads the whole response. Raises httpx's exceptions."""

    def __init__(
        self, *, timeout_s: float, connect_timeout_s: float, read_timeout_s: float | None, connections: int
    ) -> None:
        builder = (
            ClientBuilder()
            .user_agent("eagleray")
            .timeout(timedelta(seconds=timeout_s))
            .connect_timeout(timedelta(seconds=connect_timeout_s))
            .follow_redirects(False)  # none may carry the key to another host
            .referer(False)
            .gzip(True)
            .tcp_nodelay(True)
            .tcp_keepalive(timedelta(seconds=60))
            .pool_idle_timeout(timedelta(seconds=50))  # below the 60 s after which most load balancers close
            .pool_max_idle_per_host(connections)
        )
        _exit_quietly()
        if read_timeout_s is not None:
            builder = builder.read_timeout(timedelta(seconds=read_timeout_s))
        if bundle := os.environ.get("SSL_CERT_FILE"):
            try:
                builder = builder.add_root_certificate_pem(Path(bundle).read_bytes())
            except OSError as error:
                raise ConfigError(f"SSL_CERT_FILE={bundle} cannot be read: {error.strerror}") from None
        self.client: Client = builder.build()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        reply = await self.send(request.method, str(request.url), dict(request.headers), await request.aread())
        return httpx.Response(reply.status, headers=list(reply.headers.items()), content=reply.content)

    async def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        content: bytes,
        feed: Callable[[bytes], None] | None = None,
    ) -> Reply:
        """The same without httpx's objects, whose making takes a third of the time. Raises httpx's exceptions.

        `feed` gets the body in the pieces that come where it is a stream of events.
        """
        builder = self.client.request(method, url).headers(headers).body_bytes(content)
        if feed is not None:  # else the head comes with the first 64 KiB, which is whole answers
            builder = builder.streamed_read_buffer_limit(0)
        request = builder.build_streamed()
        try:
            async with request as response:
                chunks: list[bytes] = []
                size = 0
                events = response.status < 300 and response.headers.get("content-type", "").startswith("text/event-stream")
                while (chunk := await response.body_reader.read_chunk()) is not None:
                    size += len(chunk)
                    if size > MAX_BODY_BYTES:
                        raise httpx.DecodingError(f"the answer is longer than {MAX_BODY_BYTES >> 20} MiB")
                    chunks.append(bytes(chunk))
                    if events and feed is not None:
                        feed(chunks[-1])
                return Reply(response.status, response.headers, b"".join(chunks))
        except exceptions.PyreqwestError as error:
            raise _translated(error) from None

    def check(self, url: str, headers: Mapping[str, str]) -> None:
        """Raises `ConfigError` for headers that HTTP does not allow; their values, which may be secrets, are not said."""
        for name, value in headers.items():
            try:
                self.client.post(url).headers({name: value})
            except ValueError:
                raise ConfigError(f"the header {name!r} or its value is not valid in HTTP") from None

    async def aclose(self) -> None:
        await self.client.close()


@functools.cache
def _exit_quietly() -> None:
    """Its thread may still be letting go of the last response when the interpreter ends, and would abort the process:
    give it the GIL for a moment before."""
    atexit.register(time.sleep, 0.05)


def _translated(error: exceptions.PyreqwestError) -> httpx.RequestError:
    causes = getattr(error, "details", None) or {}
    found = [cause.get("message", "") for cause in causes.get("causes") or ()]
    said = ": ".join(dict.fromkeys([error.message, *found[-1:]]))
    for ours, theirs in _ERRORS:
        if isinstance(error, ours):
            return theirs(said)
    return httpx.TransportError(said)
