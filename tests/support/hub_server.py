"""The parts of the Hugging Face Hub's API that a dataset of files needs, on loopback: one dataset, `org/name`."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

from aiohttp import web

from tests.support.loopback import LoopbackServer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
COMMIT = "0" * 39 + "1"


class HubServer(LoopbackServer):
    """`files` maps a path in the dataset to its content. `revisions` has the files of further revisions. With `token`, the
    dataset is private. With `down`, every connection breaks."""

    def __init__(
        self, files: dict[str, bytes], token: str = "", revisions: dict[str, dict[str, bytes]] | None = None
    ) -> None:
        self.files, self.token = files, token
        self.revisions = {"main": files, COMMIT: files, **(revisions or {})}
        self.down = False

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self.refuse])
        dataset = "/api/datasets/org/name"
        app.router.add_get(dataset, self.about)
        app.router.add_get(f"{dataset}/revision/{{revision}}", self.about)
        app.router.add_get(f"{dataset}/tree/{{revision}}", self.tree)
        app.router.add_get(f"{dataset}/tree/{{revision}}/{{path:.*}}", self.tree)
        app.router.add_post(f"{dataset}/paths-info/{{revision}}", self.paths)
        app.router.add_get("/datasets/org/name/resolve/{revision}/{path:.*}", self.file)
        return app

    @web.middleware
    async def refuse(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answers as the hub does for what a client must not see, or what is not there."""
        if self.down and request.transport is not None:
            request.transport.abort()
        known = request.headers.get("Authorization") == f"Bearer {self.token}"
        if "/org/name" not in request.path or (self.token and not known):
            signed_in = "Authorization" in request.headers
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return web.json_response({"error": "Repository not found"}, status=404 if signed_in else 401, headers=headers)
        revision = request.match_info.get("revision", "main")
        if revision not in self.revisions:
            headers = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}
            return web.json_response({"error": f"Invalid rev id: {revision}"}, status=404, headers=headers)
        request["files"] = self.revisions[revision]
        return await handler(request)

    async def about(self, request: web.Request) -> web.Response:
        revision = request.match_info.get("revision", "main")
        sha = COMMIT if revision == "main" else revision
        return web.json_response({"id": "org/name", "sha": sha, "private": False, "tags": [], "siblings": []})

    def _entry(self, files: dict[str, bytes], path: str) -> dict[str, object] | None:
        if path in files:
            oid = hashlib.sha1(files[path]).hexdigest()
            return {"type": "file", "path": path, "size": len(files[path]), "oid": oid}
        if any(name.startswith(f"{path}/") for name in files):
            return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        return None

    async def tree(self, request: web.Request) -> web.Response:
        above = request.match_info.get("path", "")
        recursive = request.query.get("recursive", "").lower() == "true"
        found = set()
        for name in request["files"]:
            if above and not name.startswith(f"{above}/"):
                continue
            parts = name[len(above) :].strip("/").split("/")
            for depth in range(1, len(parts) + 1 if recursive else 2):
                found.add("/".join([above, *parts[:depth]]).strip("/"))
        if above and not found:
            return web.json_response({"error": "no such entry"}, status=404, headers={"X-Error-Code": "EntryNotFound"})
        return web.json_response([self._entry(request["files"], path) for path in sorted(found)])

    async def paths(self, request: web.Request) -> web.Response:
        form = await request.post() if request.content_type != "application/json" else await request.json()
        paths = form.getall("paths") if hasattr(form, "getall") else form["paths"]
        entries = [self._entry(request["files"], str(path)) for path in (paths if isinstance(paths, list) else [paths])]
        return web.json_response([entry for entry in entries if entry])

    async def file(self, request: web.Request) -> web.StreamResponse:
        data = request["files"].get(request.match_info["path"])
        if data is None:
            return web.json_response({"error": "no such entry"}, status=404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start, stop, _ = (
            request.http_range.indices(len(data)) if request.http_range.start is not None else (0, len(data), 1)
        )
        status = 206 if request.http_range.start is not None else 200
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return web.Response(body=data[start:stop], status=status, headers=headers)
