"""Anthropic's Message Batches. https://docs.anthropic.com/en/api/creating-message-batches"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import orjson

from engines.errors import EngineError
from engines.remote.batch.client import BatchAnswer, BatchState, BatchStatus, BatchWire, Requests, cancelled, expired
from engines.remote.errors import failure

_BATCHES = "/messages/batches"
_PAGE = 100
# Their clock and ours may differ by this.
_SKEW_S = 300.0
# The HTTP status of each error type, as outside of batches.
_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_OPEN, _CLOSE = b'{"requests":[', b"]}"


class AnthropicBatches(BatchWire):
    max_rows = 100_000
    max_bytes = 256_000_000
    names_batches = False

    def line(self, custom_id: str, body: dict[str, Any]) -> dict[str, Any]:
        return {"custom_id": custom_id, "params": body}

    def upload(self, requests: Requests) -> str | None:
        return None

    def submit(self, requests: Requests, file: str | None) -> str:
        def stream() -> Iterator[bytes]:
            yield _OPEN
            with requests.open() as lines:
                for at, line in enumerate(lines):
                    yield (b"," if at else b"") + line.rstrip(b"\n")
            yield _CLOSE

        # Each line end becomes a comma, but for the last one.
        size = len(_OPEN) + requests.size - 1 + len(_CLOSE)
        headers = {"content-length": str(size), "content-type": "application/json", **self.once(requests)}
        made = self.client.json("POST", _BATCHES, body=lambda: {"content": stream(), "headers": headers}, once=True)
        return str(made["id"])

    def find(self, requests: Requests, file: str | None, since: float, known: set[str]) -> str | None:
        """The oldest batch after `since` with the same number of rows: batches of this API have no names.

        It may belong to another program. Then none of its results has one of our keys. The caller must not cancel it before
        it knows its results, and calls again with its id among the `known`.
        """
        found = None
        for batch in self.list():
            if batch.created_at < since - _SKEW_S:
                break
            if batch.total == requests.rows and batch.id not in known and batch.created_at >= since - 60:
                found = batch.id
        return found

    def status(self, id: str) -> BatchStatus:
        return self._status(self.client.json("GET", f"{_BATCHES}/{id}"))

    def _status(self, batch: dict[str, Any]) -> BatchStatus:
        counts = batch["request_counts"]
        state = BatchState.IN_PROGRESS
        if batch["processing_status"] == "ended":
            ends = {"expired": BatchState.EXPIRED, "canceled": BatchState.CANCELLED}
            state = next((ends[name] for name in ends if counts.get(name)), BatchState.COMPLETED)
        return BatchStatus(
            batch["id"],
            state,
            total=sum(counts.values()),
            done=counts.get("succeeded", 0),
            failed=counts.get("errored", 0),
            created_at=datetime.fromisoformat(batch["created_at"]).timestamp(),
            outputs=[url] if (url := batch.get("results_url")) else [],
        )

    def results(self, status: BatchStatus) -> Iterator[BatchAnswer]:
        for url in map(self.client.resolve, status.outputs):
            for line in self.client.lines(url, signed=not self.client.ours(url)):
                yield str(line.get("custom_id")), _read(line.get("result") or {})

    def cancel(self, id: str) -> None:
        self.client.send("POST", f"{_BATCHES}/{id}/cancel")

    def list(self) -> Iterator[BatchStatus]:
        after = ""
        while True:
            page = self.client.json("GET", f"{_BATCHES}?limit={_PAGE}{after}")
            yield from map(self._status, page["data"])
            if not page.get("has_more") or not page["data"]:
                return
            after = f"&after_id={page['data'][-1]['id']}"


def _read(result: dict[str, Any]) -> dict[str, Any] | EngineError:
    kind = result.get("type")
    if kind == "succeeded":
        message = result.get("message")
        return message if isinstance(message, dict) else EngineError("bad_response", "an answer without a message")
    if kind == "expired":
        return expired()
    if kind == "canceled":
        return cancelled()
    error = result.get("error") or {}
    inner = error.get("error") or error
    return failure(_STATUS.get(str(inner.get("type")), 500), orjson.dumps({"error": inner}), {})
