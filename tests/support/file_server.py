"""Files on loopback over HTTP, with the ranges that readers ask for."""

from __future__ import annotations

from aiohttp import web

from tests.support.loopback import LoopbackServer


class FileServer(LoopbackServer):
    """`files` maps a name to its content. `queries` has the query of each request."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.queries: list[str] = []

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/{name}", self.file)
        return app

    async def file(self, request: web.Request) -> web.Response:
        self.queries.append(request.query_string)
        content = self.files.get(request.match_info["name"])
        if content is None:
            raise web.HTTPNotFound
        headers = {"Accept-Ranges": "bytes"}
        asked = request.http_range
        if asked.start is None and asked.stop is None:
            return web.Response(body=content, headers=headers)
        start, stop = asked.start or 0, min(asked.stop or len(content), len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return web.Response(body=content[start:stop], status=206, headers=headers)
