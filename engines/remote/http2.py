"""HTTP/2, for the rare server that speaks nothing else: httpx's own client over the package h2.

aiohttp speaks HTTP/1.1 only. A server without HTTP/1.1 ends the TLS handshake with the alert `no_application_protocol`
(RFC 7301, section 3.2); from then on its requests go this way.
"""

from __future__ import annotations

import importlib.util
import ssl

import aiohttp
import httpx

from engines.remote.http_connection import MAX_BODY_BYTES, Feed, is_stream, too_long

_ALERT = "no application protocol"


def is_wanted(error: aiohttp.ClientConnectorError) -> bool:
    """True if the server ended the handshake because it does not speak HTTP/1.1."""
    cause = error.os_error
    # Python's `reason` is None for this alert, so OpenSSL's text decides.
    return isinstance(cause, ssl.SSLError) and _ALERT in str(cause).lower().replace("_", " ")


def client(timeout: aiohttp.ClientTimeout, context: ssl.SSLContext, proxy: str | None) -> httpx.AsyncClient:
    """A client for one event loop. `context` is its own: httpx writes the protocols into it.

    Raises `httpx.UnsupportedProtocol`, which ends a run, if the package h2 is missing.
    """
    if importlib.util.find_spec("h2") is None:
        raise httpx.UnsupportedProtocol("the server speaks HTTP/2 only: pip install 'eagleray[http2]'")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    times = httpx.Timeout(timeout.total, connect=timeout.connect, read=timeout.sock_read or timeout.total)
    headers = {"user-agent": "eagleray", "accept-encoding": "gzip"}
    return httpx.AsyncClient(
        http2=True, verify=context, timeout=times, limits=limits, proxy=proxy, trust_env=False, headers=headers
    )


async def read_body(response: httpx.Response, feed: Feed | None) -> bytes:
    """The whole body. A stream of events also goes to `feed`. Raises `httpx.DecodingError` for a body that is too long."""
    events = is_stream(response.status_code, response.headers)
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.aiter_bytes():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise too_long()
        if events and feed is not None:
            feed(chunk)
        else:
            chunks.append(chunk)
    return b"".join(chunks)
