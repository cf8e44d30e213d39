"""Gemini's batches of embeddings: a file of requests, an operation, a file of responses.

https://ai.google.dev/gemini-api/docs/batch-api  This is Gemini's own API; its endpoint for OpenAI's clients is beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import orjson

from engines.errors import EngineError
from engines.remote.batch.client import BatchAnswer, BatchState, BatchStatus, BatchWire, Requests
from engines.remote.errors import failure

_STATES = {
    "BATCH_STATE_SUCCEEDED": BatchState.COMPLETED,
    "BATCH_STATE_FAILED": BatchState.FAILED,
    "BATCH_STATE_EXPIRED": BatchState.EXPIRED,
    "BATCH_STATE_CANCELLED": BatchState.CANCELLED,
}
_SKEW_S = 3600.0  # their clock and ours may differ by this


class GeminiBatches(BatchWire):
    def line(self, custom_id: str, body: dict[str, Any]) -> dict[str, Any]:
        own = {name: value for name, value in body.items() if name not in ("model", "input", "dimensions")}
        request: dict[str, Any] = {"content": {"parts": [{"text": text} for text in body["input"]]}, **own}
        if "dimensions" in body:
            request["outputDimensionality"] = body["dimensions"]
        return {"key": custom_id, "request": request}

    def _beside(self, part: str) -> str:
        """The URL of another part of the API: https://…/upload/v1beta for https://…/v1beta."""
        url = urlsplit(self.client.base)
        return url._replace(path=f"/{part}{url.path}").geturl()

    def upload(self, requests: Requests) -> str | None:
        """Two steps: a request, whose answer has a URL; the file, sent to that URL."""
        kind = {"content-type": "application/jsonl"}
        begin = {
            "x-goog-upload-protocol": "resumable",
            "x-goog-upload-command": "start",
            "x-goog-upload-header-content-length": str(requests.size),
            "x-goog-upload-header-content-type": kind["content-type"],
        }
        about = {"file": {"display_name": requests.name}}
        answer = self.client.send("POST", f"{self._beside('upload')}/files", body=lambda: {"json": about, "headers": begin})
        place = answer.headers.get("x-goog-upload-url")
        if not place:
            raise EngineError("bad_response", "the answer to the upload has no URL to send the file to")

        def body() -> dict[str, Any]:
            finish = {"x-goog-upload-offset": "0", "x-goog-upload-command": "upload, finalize"}
            return {"content": requests.open(), "headers": {**kind, **finish, "content-length": str(requests.size)}}

        return str(self.client.json("POST", self.client.resolve(place), body=body, signed=True)["file"]["name"])

    def submit(self, requests: Requests, file: str | None) -> str:
        batch = {"displayName": requests.name, "inputConfig": {"fileName": file}}
        model = requests.model.removeprefix("models/")
        path = f"/models/{model}:asyncBatchEmbedContent"
        made = self.client.json("POST", path, body=lambda: {"json": {"batch": batch}}, once=True)
        return str(made["name"]).removeprefix("batches/")

    def find(self, requests: Requests, file: str | None, since: float, known: set[str]) -> str | None:
        for batch in self.list():
            if batch.created_at < since - _SKEW_S:
                break
            if batch.name == requests.name and batch.id not in known:
                return batch.id
        return None

    def status(self, id: str) -> BatchStatus:
        return self._status(self.client.json("GET", f"/batches/{id}"))

    def _status(self, operation: dict[str, Any]) -> BatchStatus:
        """Gemini gives a batch as a long-running operation; its counts are texts."""
        batch = operation.get("metadata") or {}
        counts = batch.get("batchStats") or {}
        state = _STATES.get(str(batch.get("state")), BatchState.IN_PROGRESS)
        created, output = batch.get("createTime"), operation.get("response") or batch.get("output") or {}
        found = BatchStatus(
            str(operation["name"]).removeprefix("batches/"),
            state,
            total=int(counts.get("requestCount") or 0),
            done=int(counts.get("successfulRequestCount") or 0),
            failed=int(counts.get("failedRequestCount") or 0),
            created_at=datetime.fromisoformat(created).timestamp() if created else 0.0,
            name=batch.get("displayName"),
            outputs=[output["responsesFile"]] if output.get("responsesFile") else [],
        )
        if state is BatchState.FAILED:
            self.explain_failure(found, [operation.get("error")])
        return found

    def results(self, status: BatchStatus) -> Iterator[BatchAnswer]:
        for file in status.outputs:
            for line in self.client.lines(f"{self._beside('download')}/{file}:download?alt=media"):
                yield str(line.get("key")), _outcome(line)

    def cancel(self, id: str) -> None:
        self.client.send("POST", f"/batches/{id}:cancel")

    def list(self) -> Iterator[BatchStatus]:
        token = ""
        while True:
            page = self.client.json("GET", f"/batches?pageSize=100{token}")
            yield from map(self._status, page.get("operations") or ())
            if not page.get("nextPageToken"):
                return
            token = f"&pageToken={page['nextPageToken']}"


def _outcome(line: dict[str, Any]) -> dict[str, Any] | EngineError:
    """One line of the responses, as OpenAI's embeddings would have it."""
    response, error = line.get("response"), line.get("error")
    if error or not isinstance(response, dict):
        # Google's codes of RPC: 3 is an invalid argument, 8 a limit; others are passing.
        code = error.get("code") if isinstance(error, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else {3: 400, 8: 429}.get(code or 0, 500)
        return failure(status, orjson.dumps({"error": error}), {})
    counts = response.get("usageMetadata")
    tokens = response.get("tokenCount", counts.get("promptTokenCount") if isinstance(counts, dict) else None)
    embedding = response.get("embedding")
    values = embedding.get("values") if isinstance(embedding, dict) else None
    usage = {} if tokens is None else {"usage": {"prompt_tokens": int(tokens)}}
    return {"data": [{"index": 0, "embedding": values}], **usage}
