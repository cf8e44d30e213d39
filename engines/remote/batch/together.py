"""Together's batch API: OpenAI's with another upload and other names. https://docs.together.ai/docs/batch-inference"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from engines.errors import EngineError
from engines.remote.batch.client import BatchState, BatchStatus, Requests
from engines.remote.batch.openai import OpenAIBatches

_STATES = {
    "COMPLETED": BatchState.COMPLETED,
    "FAILED": BatchState.FAILED,
    "EXPIRED": BatchState.EXPIRED,
    "CANCELLED": BatchState.CANCELLED,
}


class TogetherBatches(OpenAIBatches):
    max_bytes = 100_000_000
    names_batches = False  # `find` goes by the file, and the same file of another run has the same id

    def line(self, custom_id: str, body: dict[str, Any]) -> dict[str, Any]:
        return {"custom_id": custom_id, "body": body}

    def upload(self, requests: Requests) -> str | None:
        """Three steps: a form, whose answer has a signed URL; the file, sent to that URL; a request to process it."""
        checksum = hashlib.sha256()
        with requests.open() as file:
            for line in file:
                checksum.update(line)
        form = {
            "purpose": "batch-api",
            "file_name": f"{requests.name}.jsonl",
            "file_type": "jsonl",
            "checksum": checksum.hexdigest(),
        }
        multipart = {name: (None, value) for name, value in form.items()}
        answer = self.client.send("POST", "/files", body=lambda: {"files": multipart}, accepted=(302, 307, 409))
        if answer.status_code == 409:  # the same file was uploaded before
            return str(answer.json()["file_id"])
        place, id = answer.headers.get("location"), answer.headers.get("x-together-file-id")
        if not place or not id:
            raise EngineError("bad_response", "the answer to the upload has no URL to send the file to")

        def body() -> dict[str, Any]:
            length = {"content-length": str(requests.size), "content-type": "application/octet-stream"}
            return {"content": requests.open(), "headers": length}

        self.client.send("PUT", str(answer.url.join(place)), body=body, signed=True)
        self.client.send("POST", f"/files/{id}/preprocess")
        return str(id)

    def submit(self, requests: Requests, file: str | None) -> str:
        batch = {"input_file_id": file, "endpoint": f"/v1{self.path}", "completion_window": "24h"}
        made = self.client.json("POST", "/batches", body=lambda: {"json": batch}, once=True)
        return str((made.get("job") or made)["id"])

    def _status(self, batch: dict[str, Any]) -> BatchStatus:
        state = _STATES.get(batch["status"], BatchState.IN_PROGRESS)
        created = batch.get("created_at")
        found = BatchStatus(
            batch["id"],
            state,
            total=100,  # the API gives a percentage only
            counts_rows=False,
            done=int(batch.get("progress") or 0),
            created_at=datetime.fromisoformat(created).timestamp() if created else 0.0,
            input=batch.get("input_file_id"),
            outputs=[id for name in ("output_file_id", "error_file_id") if (id := batch.get(name))],
        )
        if state is BatchState.FAILED:
            self.explain_failure(found, [batch.get("error")])
        return found

    def list(self) -> Iterator[BatchStatus]:
        found = map(self._status, self.client.json("GET", "/batches"))
        yield from sorted(found, key=lambda batch: -batch.created_at)
