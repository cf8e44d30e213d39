"""A server on loopback that speaks the batch APIs of OpenAI (and Parasail), Anthropic, Together and Fireworks.

It keeps state: files lie on disk, batches take `delay_s`, rows meet their `fate`. The official SDKs
can speak with it (tests/test_batch.py). Base URLs: `/v1`, `/together/v1`, and `/inference/v1` beside `/v1/accounts/…`.

    with BatchServer() as server:
        server.fate = lambda custom_id, body, round: "expired" if round == 0 else "ok"
        server.submitted                    # (id of the batch, the keys in it), as they came
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from tests.support.loopback import LoopbackServer
from tests.support.task_server import DIMENSIONS, tokens, vector

# ok | error400 | error500 | expired | cancelled | missing: no word of it
Fate = Callable[[str, dict[str, Any], int], str]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CHUNK = 1000
ERROR400 = {"error": {"message": "this request is bad", "type": "invalid_request_error", "code": 400}}
NO_MONEY = "Your credit balance is too low to access the API."
ERROR402 = {"error": {"message": NO_MONEY, "type": "invalid_request_error", "code": "billing_hard_limit_reached"}}
ERROR500 = {"error": {"message": "oops", "type": "server_error", "code": 500}}
ERRORS = {"error400": ERROR400, "error402": ERROR402, "error500": ERROR500}


@dataclass
class Job:
    """One batch."""

    id: str
    wire: str
    file: Path
    ids: list[str]
    fates: dict[str, str]  # where not ok
    fate: str  # of the whole
    delay_s: float
    number: int
    input: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    created: float = field(default_factory=time.time)
    cancelled: float | None = None

    @property
    def state(self) -> str:
        """in_progress | cancelling | completed | expired | cancelled | failed"""
        if self.errors:
            return "failed"
        if self.cancelled is not None:
            return "cancelled" if time.time() > self.cancelled + 0.2 else "cancelling"
        if time.time() < self.created + self.delay_s:
            return "in_progress"
        return "expired" if self.fate == "expired" or "expired" in self.fates.values() else "completed"

    @property
    def ended(self) -> bool:
        return self.state not in ("in_progress", "cancelling")

    def counts(self) -> Counter[str]:
        """Rows by their fate; all of them in progress before the end."""
        if not self.ended:
            return Counter(processing=len(self.ids))
        if self.cancelled is not None:
            return Counter(cancelled=len(self.ids))
        found = Counter(self.fates.values())
        return found + Counter(ok=len(self.ids) - found.total())

    def outcomes(self) -> Iterator[list[tuple[str, dict[str, Any], str]]]:
        """Rows with their fates, not in order."""
        with self.file.open() as lines:
            while part := list(itertools.islice(lines, CHUNK)):
                rows = [json.loads(line) for line in reversed(part)]
                yield [
                    (row["custom_id"], row.get("body") or row.get("params"), self._fate(row["custom_id"])) for row in rows
                ]

    def _fate(self, id: str) -> str:
        return "cancelled" if self.cancelled is not None else self.fates.get(id, "ok")


def text_of(body: dict[str, Any]) -> str:
    if "input" in body:
        return str(body["input"][0])
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def chat(body: dict[str, Any]) -> dict[str, Any]:
    asked = text_of(body)
    text = asked.removeprefix("say: ") if asked.startswith("say: ") else f"answer to: {asked}"
    if asked.startswith("Rate this review "):  # docs/examples/score.yaml
        text = json.dumps({"why": asked[:40], "stars": 1 + len(asked) % 5, "mood": "calm", "topics": ["price"]})
    usage = {"prompt_tokens": len(json.dumps(body)) // 4, "completion_tokens": len(text) // 4}
    usage["total_tokens"] = sum(usage.values())
    finish = asked.removeprefix("ends with: ") if asked.startswith("ends with: ") else "stop"
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}, "logprobs": None}
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body.get("model", "m-1"),
            "choices": [choice], "usage": usage}  # fmt: skip


def embeddings(body: dict[str, Any]) -> dict[str, Any]:
    [text] = body["input"]
    numbers = vector(text, body.get("dimensions", DIMENSIONS)).tolist()
    return {"object": "list", "model": body["model"], "data": [{"index": 0, "embedding": numbers}],
            "usage": {"prompt_tokens": tokens(text), "total_tokens": tokens(text)}}  # fmt: skip


def openai_answer(body: dict[str, Any]) -> dict[str, Any]:
    return embeddings(body) if "input" in body else chat(body)


def message(body: dict[str, Any]) -> dict[str, Any]:
    text = f"answer to: {text_of(body)}"
    usage = {"input_tokens": len(json.dumps(body)) // 4, "output_tokens": len(text) // 4}
    return {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "stop_reason": "end_turn",
            "stop_sequence": None, "content": [{"type": "text", "text": text}], "usage": usage}  # fmt: skip


def rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


@dataclass
class BatchServer(LoopbackServer):
    """`fail_next` maps a step (upload, submit, poll, results, list) to how many of its requests go wrong."""

    delay_s: float = 0.0
    fate: Fate | None = None
    batch_fate: Callable[[int], str] = lambda number: "ok"
    max_queued_batches: int | None = None
    overcount: int = 0  # answers that ended batches count, but have no line for
    relative_urls: bool = False  # of results
    key: str | None = None
    fail_next: dict[str, int] = field(default_factory=dict)
    break_results_after: int | None = None
    lose_results_after: int | None = None  # once: the file ends there, as if that were all
    refuse_results: str | None = None  # all reading of results, with a 401 that says so
    on_step: Callable[[str, str], None] = lambda step, when: None
    keep: bool = True  # the bodies of all rows
    submitted: list[tuple[str, list[str]]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    created: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # bodies that made something, with their paths
    live: list[dict[str, Any]] = field(default_factory=list)
    asked: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)  # method, path and what the query names
    bad: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.folder = tempfile.TemporaryDirectory()
        self.files: dict[str, tuple[Path, dict[str, Any]]] = {}
        self.jobs: dict[str, Job] = {}
        self.times: Counter[str] = Counter()
        self.failing: Counter[str] = Counter()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.folder.cleanup()

    def times_submitted(self, custom_id: str) -> int:
        return self.times[custom_id]

    def in_progress(self) -> int:
        return sum(not job.ended for job in self.jobs.values())

    def application(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._checked])
        route = app.router.add_route
        route("POST", "/v1/chat/completions", self._live)
        route("POST", "/v1/files", self._openai_upload)
        route("GET", "/v1/files/{id}/content", self._openai_content)
        route("POST", "/v1/batches", self._openai_submit)
        route("GET", "/v1/batches", self._openai_list)
        route("GET", "/v1/batches/{id}", self._openai_status)
        route("POST", "/v1/batches/{id}/cancel", self._openai_status)
        route("POST", "/v1/messages/batches", self._anthropic_submit)
        route("GET", "/v1/messages/batches", self._anthropic_list)
        route("GET", "/v1/messages/batches/{id}", self._anthropic_status)
        route("POST", "/v1/messages/batches/{id}/cancel", self._anthropic_status)
        route("GET", "/v1/messages/batches/{id}/results", self._anthropic_results)
        route("POST", "/together/v1/files", self._together_upload)
        route("POST", "/together/v1/files/{id}/preprocess", self._together_file)
        route("GET", "/together/v1/files/{id}", self._together_file)
        route("GET", "/together/v1/files/{id}/content", self._together_content)
        route("POST", "/together/v1/batches", self._together_submit)
        route("GET", "/together/v1/batches", self._together_list)
        route("GET", "/together/v1/batches/{id}", self._together_status)
        route("POST", "/together/v1/batches/{id}/cancel", self._together_status)
        account = "/v1/accounts/acme"
        route("POST", f"{account}/datasets", self._fireworks_dataset)
        route("GET", f"{account}/datasets/{{id:[^:/]+}}", self._fireworks_dataset_state)
        route("POST", f"{account}/datasets/{{id:[^:/]+}}:upload", self._fireworks_upload)
        route("GET", f"{account}/datasets/{{id:[^:/]+}}:getDownloadEndpoint", self._fireworks_download)
        route("POST", f"{account}/batchInferenceJobs", self._fireworks_submit)
        route("GET", f"{account}/batchInferenceJobs", self._fireworks_list)
        route("GET", f"{account}/batchInferenceJobs/{{id:[^:/]+}}", self._fireworks_status)
        route("POST", f"{account}/batchInferenceJobs/{{id:[^:/]+}}:cancel", self._fireworks_status)
        route("PUT", "/signed/{id}", self._signed_put)
        route("GET", "/signed/{id}/{kind}", self._signed_get)
        return app

    @web.middleware
    async def _checked(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Who asks, and whether this request is one that goes wrong."""
        self.asked.append((request.method, request.path, tuple(sorted(request.query))))
        given = request.headers.get("authorization", "").removeprefix("Bearer ") or request.headers.get("x-api-key", "")
        if request.path.startswith("/signed/"):
            if given:
                self.bad.append(f"{request.method} {request.path} came with a key")
            return await handler(request)
        if not given or (self.key is not None and given != self.key):
            return web.json_response({"error": {"message": "who are you?", "type": "authentication_error"}}, status=401)
        if "/messages/" in request.path and request.headers.get("anthropic-version") != "2023-06-01":
            self.bad.append(f"{request.path} came without anthropic-version")
        step = _step(request)
        if step == "results" and self.refuse_results:
            return web.json_response({"error": {"message": self.refuse_results}}, status=401)
        wrong = self.fail_next.get(step, 0) > 0
        if wrong:
            self.fail_next[step] -= 1
            self.failing[step] += 1
            if step == "submit":  # made, and the word of it is lost
                await handler(request)
                self._cut(request)
            if self.failing[step] % 2:
                return web.json_response(ERROR500, status=500)
            self._cut(request)
        return await handler(request)

    def _cut(self, request: web.Request) -> None:
        assert request.transport is not None
        request.transport.abort()
        raise ConnectionResetError

    # -- what all share -----------------------------------------------------------------------------------------------

    async def _keep(self, request: web.Request, name: str) -> Path:
        """The file of a multipart upload, or the whole body, on disk."""
        path = Path(self.folder.name) / name
        with path.open("wb") as file:
            if request.content_type != "multipart/form-data":
                async for chunk in request.content.iter_chunked(1 << 16):
                    file.write(chunk)
                return path
            async for part in await request.multipart():
                if getattr(part, "name", "") == "file":
                    while chunk := await part.read_chunk(1 << 16):  # type: ignore[union-attr]
                        file.write(chunk)
                else:
                    self.created.append((request.path, {part.name: await part.text()}))  # type: ignore[union-attr, dict-item]
        return path

    def _make(self, wire: str, file: Path, wanted: set[str], id: str = "", url: str = "", **more: Any) -> Job:
        """A batch of a file, whose lines must have exactly the keys `wanted`, and this `url` if they have one."""
        number = len(self.jobs)
        job = Job(id or f"batch_{number}", wire, file, [], {}, self.batch_fate(number), self.delay_s, number, **more)
        models = set()
        with file.open() as lines:
            for at, line in enumerate(lines, 1):
                row = json.loads(line)
                body = row.get("body") or row.get("params") or {}
                models.add(body.get("model"))
                if row.keys() != wanted or not re.fullmatch(r"[\w-]{1,64}", row["custom_id"]):
                    job.errors.append({"code": "invalid_request", "line": at, "message": f"line {at} has {sorted(row)}"})
                if row.get("url", url) != url:
                    job.errors.append({"code": "invalid_url", "line": at, "message": f"line {at} goes to {row['url']}"})
                job.ids.append(row["custom_id"])
                if self.fate and (fate := self.fate(row["custom_id"], body, self.times[row["custom_id"]])) != "ok":
                    job.fates[row["custom_id"]] = fate
                if self.keep:
                    self.bodies.append(body)
        if len(set(job.ids)) < len(job.ids) or len(models) > 1:
            job.errors.append({"code": "invalid", "line": None, "message": f"ids come twice, or models differ: {models}"})
        if job.fate in ("failed", "token_limit_exceeded", "billing_hard_limit_reached"):
            said = NO_MONEY if job.fate == "billing_hard_limit_reached" else f"the batch is {job.fate}"
            job.errors.append({"code": job.fate, "line": None, "message": said})
        if job.errors and job.fate == "ok":
            self.bad += [str(error) for error in job.errors]
        if job.fate != "token_limit_exceeded":
            self.times.update(job.ids)
            self.submitted.append((job.id, job.ids))
        self.jobs[job.id] = job
        return job

    def _full(self) -> web.Response | None:
        if self.max_queued_batches is not None and self.in_progress() >= self.max_queued_batches:
            return web.json_response({"error": {"message": "too many batches", "type": "rate_limit_error"}}, status=429)
        return None

    def _job(self, request: web.Request) -> Job:
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            raise web.HTTPNotFound(text='{"error": {"message": "no such batch"}}', content_type="application/json")
        if request.path.endswith("cancel") and not job.ended and job.cancelled is None:
            job.cancelled = time.time()
        return job

    async def _stream(
        self, request: web.Request, job: Job, line: Callable[[str, dict[str, Any], str], dict[str, Any] | None]
    ) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        async for text, sent in self._lines(job, line):
            await response.write(text)
            if self.break_results_after is not None and sent >= self.break_results_after:
                self.break_results_after = None
                await asyncio.sleep(0.1)
                self._cut(request)
            if self.lose_results_after is not None and sent >= self.lose_results_after:
                self.lose_results_after = None
                break
        await response.write_eof()
        return response

    async def _lines(
        self, job: Job, line: Callable[[str, dict[str, Any], str], dict[str, Any] | None]
    ) -> AsyncIterator[tuple[bytes, int]]:
        sent, halfway = 0, False
        for rows in job.outcomes():
            for id, body, fate in rows:
                found = line(id, body, fate) if fate != "missing" else None
                if found is not None:
                    sent += 1
                    yield json.dumps(found, ensure_ascii=False).encode() + b"\n", sent
                    if not halfway and 2 * sent >= len(job.ids):
                        halfway = True
                        await asyncio.sleep(0.05)
                        self.on_step("results", "middle")

    # -- OpenAI -------------------------------------------------------------------------------------------------------

    async def _live(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.live.append(body)
        return web.json_response(chat(body))

    async def _openai_upload(self, request: web.Request) -> web.Response:
        id = f"file-{len(self.files)}"
        path = await self._keep(request, id)
        self.on_step("upload", "before")
        about = {"id": id, "object": "file", "bytes": path.stat().st_size, "created_at": int(time.time()),
                 "filename": f"{id}.jsonl", "purpose": "batch", "status": "processed"}  # fmt: skip
        self.files[id] = path, about
        self.on_step("upload", "after")
        return web.json_response(about)

    async def _openai_submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.created.append((request.path, body))
        self.on_step("submit", "before")
        if full := self._full():
            return full
        file = self.files[body["input_file_id"]][0]
        wanted = {"custom_id", "method", "url", "body"}
        more = {"input": body["input_file_id"], "extra": body.get("metadata") or {}, "url": body["endpoint"]}
        job = self._make("openai", file, wanted, **more)
        self.on_step("submit", "after")
        return web.json_response(self._openai(job))

    def _openai(self, job: Job) -> dict[str, Any]:
        counts = job.counts()
        done, ended = 0 if job.errors else counts["ok"], job.ended and not job.errors
        counted = done + self.overcount * ended
        found = {
            "id": job.id, "object": "batch", "endpoint": "/v1/chat/completions", "input_file_id": job.input,
            "completion_window": "24h", "status": job.state, "created_at": int(job.created), "metadata": job.extra,
            "request_counts": {"total": len(job.ids), "completed": counted, "failed": len(job.ids) - done if ended else 0},
            "errors": {"object": "list", "data": job.errors} if job.errors else None,
        }  # fmt: skip
        if ended and done:
            found["output_file_id"] = f"{job.id}.output"
        if ended and set(counts) - {"ok", "missing"}:
            found["error_file_id"] = f"{job.id}.error"
        return found

    async def _openai_list(self, request: web.Request) -> web.Response:
        jobs = sorted((j for j in self.jobs.values() if j.wire == "openai"), key=lambda job: -job.number)
        if after := request.query.get("after"):
            jobs = [job for job in jobs if job.number < self.jobs[after].number]
        page = jobs[: int(request.query.get("limit", 20))]
        data = [self._openai(job) for job in page]
        ends = {"first_id": page[0].id, "last_id": page[-1].id} if page else {}
        return web.json_response({"object": "list", "data": data, "has_more": len(page) < len(jobs), **ends})

    async def _openai_status(self, request: web.Request) -> web.Response:
        return web.json_response(self._openai(self._job(request)))

    async def _openai_content(self, request: web.Request) -> web.StreamResponse:
        id, _, kind = request.match_info["id"].partition(".")
        return await self._stream(request, self.jobs[id], _openai_line(kind == "output"))

    # -- Anthropic ----------------------------------------------------------------------------------------------------

    async def _anthropic_submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.created.append((request.path, body if self.keep else {}))
        self.on_step("submit", "before")
        if full := self._full():
            return full
        file = Path(self.folder.name) / f"anthropic-{len(self.jobs)}"
        file.write_text("".join(json.dumps(row) + "\n" for row in body["requests"]))
        job = self._make("anthropic", file, {"custom_id", "params"})
        self.on_step("submit", "after")
        return web.json_response(self._anthropic(job))

    def _anthropic(self, job: Job) -> dict[str, Any]:
        counts = job.counts()
        status = {"in_progress": "in_progress", "cancelling": "canceling"}.get(job.state, "ended")
        return {
            "id": job.id, "type": "message_batch", "processing_status": status, "created_at": rfc3339(job.created),
            "expires_at": rfc3339(job.created + 86400), "ended_at": rfc3339(time.time()) if job.ended else None,
            "cancel_initiated_at": rfc3339(job.cancelled) if job.cancelled else None, "archived_at": None,
            "results_url": f"{'' if self.relative_urls else self.url}/v1/messages/batches/{job.id}/results"
            if job.ended else None,
            "request_counts": {
                "processing": counts["processing"], "succeeded": counts["ok"] + self.overcount * job.ended,
                "expired": counts["expired"],
                "canceled": counts["cancelled"],
                "errored": counts.total() - sum(counts[name] for name in ("processing", "ok", "expired", "cancelled")),
            },
        }  # fmt: skip

    async def _anthropic_list(self, request: web.Request) -> web.Response:
        jobs = sorted((j for j in self.jobs.values() if j.wire == "anthropic"), key=lambda job: -job.number)
        if after := request.query.get("after_id"):
            jobs = [job for job in jobs if job.number < self.jobs[after].number]
        page = jobs[: int(request.query.get("limit", 20))]
        data = [self._anthropic(job) for job in page]
        ends = {"first_id": page[0].id if page else None, "last_id": page[-1].id if page else None}
        return web.json_response({"data": data, "has_more": len(page) < len(jobs), **ends})

    async def _anthropic_status(self, request: web.Request) -> web.Response:
        return web.json_response(self._anthropic(self._job(request)))

    async def _anthropic_results(self, request: web.Request) -> web.StreamResponse:
        def line(id: str, body: dict[str, Any], fate: str) -> dict[str, Any]:
            result: dict[str, Any] = {"type": {"expired": "expired", "cancelled": "canceled"}.get(fate, "errored")}
            if fate == "ok":
                result = {"type": "succeeded", "message": message(body)}
            elif result["type"] == "errored":
                kind = "api_error" if fate == "error500" else "invalid_request_error"
                said = NO_MONEY if fate == "error402" else "bad"
                result["error"] = {"type": "error", "error": {"type": kind, "message": said}, "request_id": None}
            return {"custom_id": id, "result": result}

        return await self._stream(request, self._job(request), line)

    # -- Together -----------------------------------------------------------------------------------------------------

    async def _together_upload(self, request: web.Request) -> web.Response:
        form = dict(await request.post())
        self.created.append((request.path, form))
        self.on_step("upload", "before")
        if form.keys() != {"purpose", "file_name", "file_type", "checksum"} or form["purpose"] != "batch-api":
            self.bad.append(f"an upload of {form}")
        id = f"tfile-{len(self.files)}"
        self.files[id] = Path(self.folder.name) / id, {"filename": form["file_name"]}
        headers = {"location": f"{self.url}/signed/{id}?signature=x", "x-together-file-id": id}
        return web.Response(status=302, headers=headers)

    async def _signed_put(self, request: web.Request) -> web.Response:
        if "content-length" not in request.headers:
            self.bad.append("a signed upload in chunks")
        await self._keep(request, request.match_info["id"])
        return web.Response()

    async def _together_file(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        path, about = self.files[id]
        if request.method == "POST":
            self.on_step("upload", "after")
        return web.json_response(
            {
                "id": id,
                "object": "file",
                "bytes": path.stat().st_size,
                "created_at": 1,
                "FileType": "jsonl",
                "LineCount": 1,
                "Processed": True,
                "purpose": "batch-api",
                "filename": about["filename"],
            }
        )

    async def _together_content(self, request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"location": f"/signed/{request.match_info['id'].replace('.', '/')}"})

    async def _signed_get(self, request: web.Request) -> web.StreamResponse:
        job, kind = self._job(request), request.match_info["kind"]
        return await self._stream(request, job, _openai_line(kind == "output", bare=job.wire == "fireworks"))

    async def _together_submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.created.append((request.path, body))
        self.on_step("submit", "before")
        job = self._make(
            "together", self.files[body["input_file_id"]][0], {"custom_id", "body"}, input=body["input_file_id"]
        )
        self.on_step("submit", "after")
        return web.json_response({"job": self._together(job), "warning": None})

    def _together(self, job: Job) -> dict[str, Any]:
        counts, state = job.counts(), "in_progress" if job.state == "cancelling" else job.state
        found = {
            "id": job.id, "input_file_id": job.input, "status": state.upper(), "endpoint": "/v1/chat/completions",
            "created_at": rfc3339(job.created), "progress": 100.0 if job.ended else 0.0, "file_size_bytes": 1,
            "error": job.errors[0]["message"] if job.errors else None,
        }  # fmt: skip
        if job.ended and not job.errors:
            found["output_file_id"] = f"{job.id}.output"
            if set(counts) - {"ok", "missing"}:
                found["error_file_id"] = f"{job.id}.error"
        return found

    async def _together_list(self, request: web.Request) -> web.Response:
        return web.json_response([self._together(job) for job in self.jobs.values() if job.wire == "together"])

    async def _together_status(self, request: web.Request) -> web.Response:
        return web.json_response(self._together(self._job(request)))

    # -- Fireworks ----------------------------------------------------------------------------------------------------

    async def _fireworks_dataset(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.created.append((request.path, body))
        id = body["datasetId"]
        if id in self.files:
            return web.json_response({"code": 6, "message": "it exists"}, status=409)
        self.files[id] = Path(self.folder.name) / id, {}
        return web.json_response({"name": f"accounts/acme/datasets/{id}", "state": "UPLOADING"})

    async def _fireworks_dataset_state(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        if id not in self.files:
            return web.json_response({"code": 5, "message": "no such dataset"}, status=404)
        state = "READY" if self.files[id][0].exists() else "UPLOADING"
        return web.json_response({"name": f"accounts/acme/datasets/{id}", "state": state})

    async def _fireworks_upload(self, request: web.Request) -> web.Response:
        path = await self._keep(request, f"{request.match_info['id']}.part")
        self.on_step("upload", "before")
        path.rename(path.with_suffix(""))
        self.on_step("upload", "after")
        return web.json_response({})

    async def _fireworks_submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.created.append((request.path, body))
        self.on_step("submit", "before")
        id = request.query["batchInferenceJobId"]
        if id in self.jobs:
            return web.json_response({"code": 6, "message": "it exists"}, status=409)
        if full := self._full():
            return full
        file = self.files[body["inputDatasetId"].rsplit("/", 1)[1]][0]
        job = self._make("fireworks", file, {"custom_id", "body"}, id, input=body["inputDatasetId"], extra=body)
        self.on_step("submit", "after")
        return web.json_response(self._fireworks(job))

    def _fireworks(self, job: Job) -> dict[str, Any]:
        counts, state = job.counts(), {"in_progress": "running"}.get(job.state, job.state)
        done, failed = counts.get("ok", 0), sum(counts.get(name, 0) for name in ERRORS)
        said = job.errors[0]["message"] if job.errors else ""
        return {
            "name": f"accounts/acme/batchInferenceJobs/{job.id}", "state": f"JOB_STATE_{state.upper()}",
            "createTime": rfc3339(job.created).replace("+00:00", "Z"), "status": {"code": "OK", "message": said},
            **{name: job.extra[name] for name in ("displayName", "model", "inputDatasetId", "outputDatasetId")},
            "jobProgress": {
                "totalInputRequests": len(job.ids), "successfullyProcessedRequests": done, "failedRequests": failed,
                "totalProcessedRequests": done + failed, "percent": 100 if job.ended else 0,
            },
        }  # fmt: skip

    async def _fireworks_list(self, request: web.Request) -> web.Response:
        jobs = [self._fireworks(job) for job in self.jobs.values() if job.wire == "fireworks"]
        return web.json_response({"batchInferenceJobs": jobs, "nextPageToken": "", "totalSize": len(jobs)})

    async def _fireworks_status(self, request: web.Request) -> web.Response:
        return web.json_response(self._fireworks(self._job(request)))

    async def _fireworks_download(self, request: web.Request) -> web.Response:
        wanted = request.match_info["id"]
        for job in self.jobs.values():
            if job.wire == "fireworks" and job.extra["outputDatasetId"].endswith(f"/{wanted}"):
                names = {"BIJOutputSet.jsonl": "output", "error-data": "error"}
                urls = {name: f"{self.url}/signed/{job.id}/{kind}?signature=x" for name, kind in names.items()}
                return web.json_response({"filenameToSignedUrls": urls})
        return web.json_response({"code": 5, "message": "no such dataset"}, status=404)


def _step(request: web.Request) -> str:
    """What a request is to whoever runs batches."""
    path, post = request.path, request.method == "POST"
    if path.endswith(("/content", "/results", ":getDownloadEndpoint")):
        return "results"
    if post and path.endswith(("/files", ":upload")):
        return "upload"
    if path.endswith(("/batches", "/batchInferenceJobs")):
        return "submit" if post else "list"
    return "poll" if not post and ("/batches/" in path or "/batchInferenceJobs/" in path) else "other"


def _openai_line(output: bool, bare: bool = False) -> Callable[[str, dict[str, Any], str], dict[str, Any] | None]:
    """The lines of the output file, or of the one with errors; `bare` ones have the body itself as their response."""

    def line(id: str, body: dict[str, Any], fate: str) -> dict[str, Any] | None:
        if (fate == "ok") != output:
            return None
        found: dict[str, Any] = {"id": f"batch_req_{id[:8]}", "custom_id": id, "response": None, "error": None}
        if fate == "ok":
            found["response"] = {"status_code": 200, "request_id": "r", "body": openai_answer(body)}
        elif fate in ERRORS:  # a provider says 400, too, where the account has no money
            status = 400 if fate == "error402" else int(fate[5:])
            found["response"] = {"status_code": status, "request_id": "r", "body": ERRORS[fate]}
        else:
            found["error"] = {"code": f"batch_{fate}", "message": f"the batch is {fate}"}
        if bare:
            return {"custom_id": id, "response": chat(body)} if output else {"custom_id": id, **_bare_error(fate)}
        return found

    return line


def _bare_error(fate: str) -> dict[str, Any]:
    code = {"error400": 400, "error402": 402, "error500": 500}.get(fate, f"batch_{fate}")
    return {"error": {"code": code, "message": f"it is {fate}"}}
