"""Fetches media from web addresses that strangers chose: the client of a server, or the author of a dataset.

Only http:// and https://. A connection goes to a public address, or to a network in `engine.media_private_networks`. The
address is checked at the socket that connects. So no spelling, DNS answer or redirect leads to another address. Bytes and
time are bounded. Proxies are not used: a proxy looks the name up itself, so the address could not be checked.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import aiohttp
from yarl import URL

from engines.errors import EngineError, invalid
from engines.remote.http import ssl_context

MOST_REDIRECTS = 5
# Connections of one request at a time.
CONNECTIONS = 4
_REDIRECTS = (301, 302, 303, 307, 308)

# `ipaddress` does not call these private, but no public server has such an address: protocol assignments, 6to4 relays, and
# the address at which Azure's virtual machines reach their host.
_NOT_PUBLIC = tuple(map(IPv4Network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")))
# The global unicast addresses of IPv6.
_UNICAST = IPv6Network("2000::/3")
# IPv6 networks whose last 32 bits are the IPv4 address that is reached: mapped addresses, NAT64.
_EMBEDDING = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"))


@dataclass(frozen=True, slots=True)
class FetchLimits:
    private_networks: tuple[IPv4Network | IPv6Network, ...]
    max_bytes: int  # of one response
    timeout_s: float  # for all addresses of a call, with their redirects


@dataclass(frozen=True, slots=True)
class Fetched:
    data: bytes
    media_type: str  # as the server declares it


async def fetch(urls: Collection[str], limits: FetchLimits) -> dict[str, Fetched]:
    """Fetches all `urls`. Raises `EngineError("invalid_input")` if one of them cannot be fetched."""
    try:
        async with asyncio.timeout(limits.timeout_s), _session(limits) as session, asyncio.TaskGroup() as group:
            tasks = {url: group.create_task(_fetch(session, url, limits.max_bytes)) for url in urls}
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    except TimeoutError:
        slow = next((url for url, task in tasks.items() if task.cancelled()), next(iter(urls)))
        raise invalid(f"{shown(slow)} cannot be fetched within engine.media_timeout_s={limits.timeout_s:g}") from None
    return {url: task.result() for url, task in tasks.items()}


def _session(limits: FetchLimits) -> aiohttp.ClientSession:
    def open_socket(address: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, (host, *_) = address
        if not is_allowed(ip_address(host), limits.private_networks):
            raise _NoPublicAddress("not a public address")
        return socket.socket(family, kind, protocol)

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            resolver=aiohttp.ThreadedResolver(),
            socket_factory=open_socket,
            limit=CONNECTIONS,
            ssl=ssl_context(os.environ.get("SSL_CERT_FILE")),
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        # Media are compressed already. A compressed response could be far larger than its bytes.
        auto_decompress=False,
        headers={"User-Agent": "eagleray", "Accept-Encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=None),
    )


class _NoPublicAddress(OSError):
    """A socket was not opened because its address is not allowed."""


async def _fetch(session: aiohttp.ClientSession, url: str, max_bytes: int) -> Fetched:
    target = url
    try:
        for _ in range(MOST_REDIRECTS + 1):
            place = URL(target)
            if place.scheme not in ("http", "https") or not place.host:
                raise invalid(f"{shown(target)} cannot be fetched: only http:// and https:// are supported")
            async with session.get(place, allow_redirects=False) as response:
                location = response.headers.get("location")
                if response.status not in _REDIRECTS or location is None:
                    return await _read(response, target, max_bytes)
                target = str(place.join(URL(location)))
    except aiohttp.ClientConnectorError as error:
        if isinstance(error.os_error, (_NoPublicAddress, socket.gaierror)):
            raise _no_public_address(target) from None
        reason = os.strerror(error.os_error.errno) if error.os_error.errno else "no connection"
        raise invalid(f"{shown(target)} cannot be fetched: {reason}") from None
    except aiohttp.InvalidURL:
        raise invalid(f"{shown(target)} cannot be fetched: it is not a valid address") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:  # their texts may hold the query, which may be a secret
        raise invalid(f"{shown(target)} cannot be fetched: {type(error).__name__}") from None
    raise invalid(f"{shown(url)} cannot be fetched: more than {MOST_REDIRECTS} redirects")


async def _read(response: aiohttp.ClientResponse, url: str, max_bytes: int) -> Fetched:
    """The body of a response; stops as soon as it is too large."""
    if response.status != 200:
        raise invalid(f"{shown(url)} cannot be fetched: the server answered with status {response.status}")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise invalid(f"{shown(url)} cannot be fetched: the server compressed it, without being asked to")
    data = bytearray()
    size = response.content_length or 0
    if size <= max_bytes:
        async for chunk in response.content.iter_any():
            data += chunk
            size = len(data)
            if size > max_bytes:
                break
    if size > max_bytes:
        raise invalid(f"{shown(url)} has more than engine.media_max_bytes={max_bytes} bytes")
    return Fetched(bytes(data), response.content_type)


def _no_public_address(url: str) -> EngineError:
    """One text for a private address and for an unknown name: a client must not learn the names of a private network."""
    host = URL(url).host
    return invalid(
        f"{shown(url)} cannot be fetched: {host!r:.100} has no public address "
        "(engine.media_private_networks allows private ones)"
    )


def shown(url: str) -> str:
    """A URL for messages: without its credentials and its query, which may be secrets."""
    try:
        place = URL(url)
        text = f"{place.scheme}://{place.host_subcomponent}{f':{place.explicit_port}' if place.explicit_port else ''}"
        return f"{text}{place.raw_path}"[:200]
    except ValueError:
        return "an address that is not valid"


# -- addresses --------------------------------------------------------------------------------------------------------


def parse_networks(given: str | Sequence[str]) -> tuple[IPv4Network | IPv6Network, ...]:
    """Networks from texts such as 10.0.0.0/8, or single addresses. Raises `ValueError`."""
    return tuple(ip_network(text, strict=False) for text in ([given] if isinstance(given, str) else given))


def is_allowed(address: IPv4Address | IPv6Address, networks: Collection[IPv4Network | IPv6Network]) -> bool:
    """True for a public address, and for one in `networks`."""
    reached = _reached(address)
    return _is_public(reached) or any(found in network for found in (address, reached) for network in networks)


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if not address.is_global or address.is_multicast:
        return False
    if isinstance(address, IPv6Address):
        return address in _UNICAST
    return not any(address in network for network in _NOT_PUBLIC)


def _reached(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that is reached through an IPv6 address which embeds it; otherwise the address itself."""
    if isinstance(address, IPv4Address):
        return address
    if address.sixtofour is not None:
        return address.sixtofour
    if any(address in network for network in _EMBEDDING):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address
