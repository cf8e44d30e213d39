"""A server on loopback with Gemini's batches of embeddings. Each batch is in progress until its state was asked once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.support.loopback import LoopbackServer
from tests.support.task_server import DIMENSIONS, tokens, vector


@dataclass
class GeminiBatchServer(LoopbackServer):
    """A text in `bad` fails alone. `keys` are the API keys that came."""

    bad: frozenset[str] = frozenset()
    files: dict[str, str] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: set[str | None] = field(default_factory=set)

    def application(self) -> web.Application:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/upload/v1beta/files", self.begin)
        app.router.add_post("/put/{id}", self.put)
        app.router.add_post("/v1beta/models/{model}:asyncBatchEmbedContent", self.submit)
        app.router.add_get("/v1beta/batches", self.list)
        app.router.add_get("/v1beta/batches/{id}", self.status)
        app.router.add_post("/v1beta/batches/{id}:cancel", self.cancel)
        app.router.add_get("/download/v1beta/files/{id}:download", self.download)
        return app

    def check(self, request: web.Request) -> None:
        assert "authorization" not in request.headers
        self.keys.add(request.headers.get("x-goog-api-key"))

    async def begin(self, request: web.Request) -> web.Response:
        self.check(request)
        assert request.headers["x-goog-upload-command"] == "start" and (await request.json())["file"]["display_name"]
        return web.Response(headers={"x-goog-upload-url": f"{self.url}/put/{len(self.files)}"})

    async def put(self, request: web.Request) -> web.Response:
        assert request.headers["x-goog-upload-command"] == "upload, finalize" and "x-goog-api-key" not in request.headers
        name = f"files/{request.match_info['id']}"
        self.files[name] = await request.text()
        return web.json_response({"file": {"name": name}})

    async def submit(self, request: web.Request) -> web.Response:
        self.check(request)
        batch = (await request.json())["batch"]
        name = f"batches/{len(self.batches)}"
        lines = self.files[batch["inputConfig"]["fileName"]].splitlines()
        about = {"displayName": batch["displayName"], "state": "BATCH_STATE_PENDING", "model": request.match_info["model"],
                 "createTime": "2126-01-01T00:00:00.123Z", "batchStats": {"requestCount": str(len(lines))}}  # fmt: skip
        self.files[f"files/of-{len(self.batches)}"] = "\n".join(json.dumps(self.answer(json.loads(line))) for line in lines)
        self.batches[name] = {"name": name, "metadata": about}
        return web.json_response(self.batches[name])

    def answer(self, line: dict[str, Any]) -> dict[str, Any]:
        [part] = line["request"]["content"]["parts"]
        if part["text"] in self.bad:
            return {"key": line["key"], "error": {"code": 3, "message": "the text is bad", "status": "INVALID_ARGUMENT"}}
        numbers = vector(part["text"], line["request"].get("outputDimensionality", DIMENSIONS)).tolist()
        return {"key": line["key"], "response": {"embedding": {"values": numbers}, "tokenCount": str(tokens(part["text"]))}}

    async def status(self, request: web.Request) -> web.Response:
        self.check(request)
        id = request.match_info["id"]
        batch = self.batches[f"batches/{id}"]
        shown = json.dumps(batch)
        if batch["metadata"]["state"] == "BATCH_STATE_PENDING":
            batch["metadata"]["state"] = "BATCH_STATE_SUCCEEDED"
            batch |= {"done": True, "response": {"responsesFile": f"files/of-{id}"}}
        return web.Response(text=shown, content_type="application/json")

    async def list(self, request: web.Request) -> web.Response:
        """One batch a page, the newest first."""
        found = [*self.batches.values()][::-1]
        at = int(request.query.get("pageToken", 0))
        more = {"nextPageToken": str(at + 1)} if at + 1 < len(found) else {}
        return web.json_response({"operations": found[at : at + 1], **more})

    async def cancel(self, request: web.Request) -> web.Response:
        self.batches[f"batches/{request.match_info['id']}"]["metadata"]["state"] = "BATCH_STATE_CANCELLED"
        return web.json_response({})

    async def download(self, request: web.Request) -> web.Response:
        self.check(request)
        return web.Response(text=self.files[f"files/{request.match_info['id']}"])
