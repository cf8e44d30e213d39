"""Servers of images on loopback, which also misbehave: endless bodies, slow bodies, redirects."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from aiohttp import web

from tests.support.loopback import LoopbackServer

CHUNK = bytes(1 << 16)


@dataclass
class MediaServer(LoopbackServer):
    """`/image`, and other paths that misbehave. `hits` counts the requests by path, `sent` the bytes of `/endless`."""

    image: bytes = b""
    image_type: str = "image/png"
    host: str = "127.0.0.1"
    port: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    sent: int = 0

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/{name}", self.handle)
        return app

    async def handle(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.hits[name] += 1
        if name == "to":
            return web.Response(status=int(request.query.get("status", "302")), headers={"location": request.query["url"]})
        if name == "loop":
            return web.Response(status=302, headers={"location": "/loop"})
        if name == "endless":
            return await self.endless(request)
        if name == "drip":
            return await self.drip(request)
        if name == "silent":
            await asyncio.Event().wait()
        if name == "gzip":
            return web.Response(body=b"\x1f\x8b" + bytes(100), headers={"content-encoding": "gzip"})
        if name == "missing":
            return web.Response(status=404)
        return web.Response(body=self.image, content_type=self.image_type)

    async def endless(self, request: web.Request) -> web.StreamResponse:
        """10 GB, in chunks or with their number in the head."""
        response = web.StreamResponse()
        response.content_type = "image/png"
        if "declared" in request.query:
            response.content_length = 10 * 10**9
        await response.prepare(request)
        while self.sent < 10 * 10**9:
            await response.write(CHUNK)
            self.sent += len(CHUNK)
        return response

    async def drip(self, request: web.Request) -> web.StreamResponse:
        """A byte now and then, for ever."""
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"\x89")
            await asyncio.sleep(0.01)
