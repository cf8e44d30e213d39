"""Fireworks' batch inference jobs: each reads one dataset and writes another.

https://docs.fireworks.ai/guides/batch-inference
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import orjson

from engines.errors import EngineError
from engines.remote.batch.client import BatchAnswer, BatchState, BatchStatus, BatchWire, Requests, outcome

_STATES = {
    "JOB_STATE_COMPLETED": BatchState.COMPLETED,
    "JOB_STATE_EARLY_STOPPED": BatchState.COMPLETED,
    "JOB_STATE_FAILED": BatchState.FAILED,
    "JOB_STATE_EXPIRED": BatchState.EXPIRED,
    "JOB_STATE_CANCELLED": BatchState.CANCELLED,
}
_JOBS = "/batchInferenceJobs"
# Fireworks checks an uploaded dataset before a job can read it: how long to wait, and how often to look.
_READY_S, _LOOK_S = 600.0, 1.0


class FireworksBatches(BatchWire):
    """Jobs and datasets have names that we choose, so a repeated request creates nothing twice."""

    max_bytes = 150_000_000  # of one upload

    def line(self, custom_id: str, body: dict[str, Any]) -> dict[str, Any]:
        return {"custom_id": custom_id, "body": {name: value for name, value in body.items() if name != "model"}}

    def upload(self, requests: Requests) -> str | None:
        id = requests.name
        dataset = {"datasetId": id, "dataset": {"userUploaded": {}, "exampleCount": str(requests.rows)}}
        self.client.send("POST", "/datasets", body=lambda: {"json": dataset}, accepted=(409,))
        if self._state(id) != "READY":
            file = f"{id}.jsonl"
            body = lambda: {"files": {"file": (file, requests.open(), "application/jsonl")}}  # noqa: E731
            self.client.send("POST", f"/datasets/{id}:upload", body=body)
        deadline = time.monotonic() + _READY_S
        while self._state(id) != "READY":
            if time.monotonic() > deadline:
                raise EngineError("timeout", f"dataset {id} is not ready after {_READY_S:.0f} s", retryable=True)
            time.sleep(_LOOK_S)
        return id

    def _state(self, id: str) -> str:
        return str(self.client.json("GET", f"/datasets/{id}").get("state"))

    def submit(self, requests: Requests, file: str | None) -> str:
        name = requests.name
        job = {
            "displayName": name,
            "model": requests.model,
            "inputDatasetId": self._dataset(str(file)),
            "outputDatasetId": self._dataset(f"{name}-out"),
        }
        path = f"{_JOBS}?batchInferenceJobId={name}"
        self.client.send("POST", path, body=lambda: {"json": job}, once=True, accepted=(409,))
        return name

    def _dataset(self, id: str) -> str:
        return f"accounts/{self.client.base.rsplit('/', 1)[1]}/datasets/{id}"

    def find(self, requests: Requests, file: str | None, since: float, known: set[str]) -> str | None:
        found = self.client.send("GET", f"{_JOBS}/{requests.name}", accepted=(404,))
        return requests.name if found.is_success else None

    def status(self, id: str) -> BatchStatus:
        return self._status(self.client.json("GET", f"{_JOBS}/{id}"))

    def _status(self, job: dict[str, Any]) -> BatchStatus:
        progress = job.get("jobProgress") or {}
        state = _STATES.get(job["state"], BatchState.IN_PROGRESS)
        created = job.get("createTime")
        found = BatchStatus(
            job["name"].rsplit("/", 1)[1],
            state,
            total=int(progress.get("totalInputRequests") or 0),
            done=int(progress.get("successfullyProcessedRequests") or 0),
            failed=int(progress.get("failedRequests") or 0),
            created_at=datetime.fromisoformat(created).timestamp() if created else 0.0,
            name=job.get("displayName"),
            input=job.get("inputDatasetId"),
            outputs=[job["outputDatasetId"].rsplit("/", 1)[1]] if job.get("outputDatasetId") else [],
        )
        if state is BatchState.FAILED:
            self.explain_failure(found, [(job.get("status") or {}).get("message")])
        return found

    def results(self, status: BatchStatus) -> Iterator[BatchAnswer]:
        for dataset in status.outputs:
            answer = self.client.send("GET", f"/datasets/{dataset}:getDownloadEndpoint", accepted=(404,))
            # A dataset that does not exist: no row was answered. The caller compares with the job's own counts.
            files = orjson.loads(answer.content).get("filenameToSignedUrls") or {} if answer.is_success else {}
            for url in map(self.client.resolve, files.values()):
                for line in self.client.lines(url, signed=True):
                    yield outcome(line)

    def cancel(self, id: str) -> None:
        self.client.send("POST", f"{_JOBS}/{id}:cancel", body=lambda: {"json": {}})

    def list(self) -> Iterator[BatchStatus]:
        token = ""
        while True:
            page = self.client.json("GET", f"{_JOBS}?pageSize=200&orderBy=create_time%20desc{token}")
            yield from map(self._status, page.get("batchInferenceJobs") or [])
            if not page.get("nextPageToken"):
                return
            token = f"&pageToken={page['nextPageToken']}"
