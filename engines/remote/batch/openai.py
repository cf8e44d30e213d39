"""The batch API of OpenAI, which other providers have too. https://platform.openai.com/docs/api-reference/batch"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engines.errors import EngineError
from engines.remote.batch.client import BatchAnswer, BatchState, BatchStatus, BatchWire, Requests, outcome

_STATES = {
    "completed": BatchState.COMPLETED,
    "failed": BatchState.FAILED,
    "expired": BatchState.EXPIRED,
    "cancelled": BatchState.CANCELLED,
}
_PAGE = 100
# Their clock and ours may differ by this; `find` ignores batches that are older.
_SKEW_S = 3600.0


class OpenAIBatches(BatchWire):
    def line(self, custom_id: str, body: dict[str, Any]) -> dict[str, Any]:
        return {"custom_id": custom_id, "method": "POST", "url": f"/v1{self.path}", "body": body}

    def upload(self, requests: Requests) -> str | None:
        def body() -> dict[str, Any]:
            file = (f"{requests.name}.jsonl", requests.open(), "application/jsonl")
            return {"data": {"purpose": "batch"}, "files": {"file": file}}

        return str(self.client.json("POST", "/files", body=body)["id"])

    def submit(self, requests: Requests, file: str | None) -> str:
        batch = {
            "input_file_id": file,
            "endpoint": f"/v1{self.path}",
            "completion_window": "24h",
            "metadata": {"eagleray": requests.name},
        }
        made = self.client.json("POST", "/batches", body=lambda: {"json": batch, "headers": self.once(requests)}, once=True)
        return str(made["id"])

    def find(self, requests: Requests, file: str | None, since: float, known: set[str]) -> str | None:
        try:
            for batch in self.list():
                if batch.created_at < since - _SKEW_S:
                    break
                if (batch.input == file or batch.name == requests.name) and batch.id not in known:
                    return batch.id
        except EngineError as error:
            if error.status in (404, 405):
                raise EngineError("not_found", "the server does not list batches, so this one cannot be found") from None
            raise
        return None

    def status(self, id: str) -> BatchStatus:
        return self._status(self.client.json("GET", f"/batches/{id}"))

    def _status(self, batch: dict[str, Any]) -> BatchStatus:
        counts = batch.get("request_counts") or {}
        errors = ((batch.get("errors") or {}).get("data")) or []
        found = BatchStatus(
            batch["id"],
            _STATES.get(batch["status"], BatchState.IN_PROGRESS),
            total=counts.get("total") or 0,
            done=counts.get("completed") or 0,
            failed=counts.get("failed") or 0,
            created_at=float(batch.get("created_at") or 0),
            name=(batch.get("metadata") or {}).get("eagleray"),
            input=batch.get("input_file_id"),
            outputs=[id for name in ("output_file_id", "error_file_id") if (id := batch.get(name))],
        )
        if found.status is BatchState.FAILED:
            self.explain_failure(found, errors)
        return found

    def results(self, status: BatchStatus) -> Iterator[BatchAnswer]:
        for file in status.outputs:
            for line in self.client.lines(f"/files/{file}/content"):
                yield outcome(line)

    def cancel(self, id: str) -> None:
        self.client.send("POST", f"/batches/{id}/cancel")

    def list(self) -> Iterator[BatchStatus]:
        after = ""
        while True:
            page = self.client.json("GET", f"/batches?limit={_PAGE}{after}")
            yield from map(self._status, page["data"])
            if not page.get("has_more") or not page["data"]:
                return
            after = f"&after={page['data'][-1]['id']}"
