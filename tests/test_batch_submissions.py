"""Submissions of batches that are refused, unclear or repeated, and batches that may belong to another program."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from aiohttp import web

from engines import load_engine
from engines.errors import ErrorCode
from engines.remote.batch import factory
from jobs.batch import main as batch_main
from pipeline.errors import Stopped
from pipeline.executors.batch import steps as steps_module
from pipeline.executors.batch.store import Batch, BatchStore
from pipeline.run import STOPPED, WITH_FAILURES
from pipeline.storage.filesystem import resolve
from tests.support.batch_server import BatchServer, Job
from tests.support.infer import Infer, ask
from tests.support.processes import until

KEY = "sk-a-secret-of-some-length"
PATHS = {"openai": "/v1", "anthropic": "/v1", "together": "/together/v1"}
MODEL = {"code": "model_not_found", "param": "body.model", "line": 1,
         "message": "The provided model 'm-1' is not supported by the Batch API."}  # fmt: skip
PARAMETER = {"code": "unsupported_parameter", "param": "temperature", "line": 1,
             "message": "Unsupported parameter: 'temperature'"}  # fmt: skip
Write = Callable[..., Path]
Handler = Callable[[web.Request], Any]


class Server(BatchServer):
    """Refuses batches as a whole, loses submissions, honours idempotency keys, and lists batches late."""

    def __init__(self) -> None:
        super().__init__(delay_s=0.2)
        self.refuses: Callable[[Job, str], list[dict[str, Any]]] = lambda job, models: []
        self.not_made = 0  # so many submissions make no batch
        self.listed: int | None = None  # so many of the oldest batches are listed; None: all
        self.idempotent = False
        self.limited = 0  # so many polls are answered with a rate limit
        self.sent_keys: list[str] = []
        self.made_for: dict[str, str] = {}  # idempotency key -> batch

    def _make(self, wire: str, file: Path, wanted: set[str], id: str = "", url: str = "", **more: Any) -> Job:
        job = super()._make(wire, file, wanted, id, url, **more)
        job.errors += self.refuses(job, file.read_text())
        return job

    async def _submitted(self, request: web.Request, submit: Handler) -> web.Response:
        key = request.headers.get("idempotency-key", "")
        self.sent_keys.append(key)
        if self.not_made:
            self.not_made -= 1
            return web.json_response({"error": {"message": "bad gateway"}}, status=502)
        if self.idempotent and key in self.made_for:
            return web.json_response(self._openai(self.jobs[self.made_for[key]]))
        answer = await submit(request)
        self.made_for[key] = json.loads(answer.body)["id"]
        return answer

    async def _openai_submit(self, request: web.Request) -> web.Response:
        return await self._submitted(request, super()._openai_submit)

    async def _anthropic_submit(self, request: web.Request) -> web.Response:
        return await self._submitted(request, super()._anthropic_submit)

    async def _openai_list(self, request: web.Request) -> web.Response:
        return await self._listing(request, super()._openai_list)

    async def _anthropic_list(self, request: web.Request) -> web.Response:
        return await self._listing(request, super()._anthropic_list)

    async def _together_list(self, request: web.Request) -> web.Response:
        return await self._listing(request, super()._together_list)

    async def _listing(self, request: web.Request, answer: Handler) -> web.Response:
        jobs = self.jobs
        self.jobs = dict(list(jobs.items())[: self.listed])
        try:
            return await answer(request)
        finally:
            self.jobs = jobs

    async def _openai_status(self, request: web.Request) -> web.Response:
        if self.limited and request.method == "GET":
            self.limited -= 1
            return web.json_response({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, status=429)
        return await super()._openai_status(request)


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for provider in PATHS:
        monkeypatch.setenv(f"{provider.upper()}_API_KEY", KEY)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running
        assert running.bad == []


def overrides(server: Server, engine: str, *more: str) -> list[str]:
    url = f"engine.base_url={server.url}{PATHS[engine]}"
    return ["engine.model=m-1", url, "run.mode=batch", "run.batch_poll_s=0.2", *more]


def conversations(count: int) -> list[dict[str, Any]]:
    return [ask(f"question {i}", id=f"r{i}") for i in range(count)]


class Steps:
    """`steps("fetch")` runs one step of `eagleray batch` over three rows; `out` is their output."""

    def __init__(self, server: Server, engine: str, data: Path, out: Path) -> None:
        self.server, self.out = server, out
        self.args = [f"engine={engine}", f"dataset.path={data}", f"output.path={out}", *overrides(server, engine)]

    def __call__(self, step: str, *more: str) -> int:
        return batch_main([step, *self.args, *more])

    def submit_unclear(self) -> None:
        """Submits one batch; the answer is lost, and the provider does not list it yet."""
        self.server.listed = 0
        assert self("submit", "run.batch_poll_s=600") == STOPPED and self.batch.state == "submitting"
        self.server.listed = None

    def fetched(self) -> int:
        """The exit status of the first `fetch` after which no batch is open."""
        return until(lambda: (status := self("fetch")) != STOPPED and (status,))[0]

    @property
    def file(self) -> Path:
        """The state of the batch."""
        [path] = (self.out / "_batches").glob("*.json")
        return path

    @property
    def batch(self) -> Batch:
        [batch] = BatchStore(*resolve(str(self.out))).batches
        return batch

    def rows(self) -> list[dict[str, Any]]:
        return [row for path in sorted((self.out / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def steps(server: Server, write_jsonl: Write, tmp_path: Path, local_ray: None) -> Callable[[str], Steps]:
    return lambda engine: Steps(server, engine, write_jsonl(conversations(3)), tmp_path / "out")


# --- a refusal of the whole batch


@pytest.mark.parametrize(
    ("engine", "error", "reason"),
    [
        ("openai", MODEL, "takes no batch for this model"),
        ("openai", {**PARAMETER, "param": "body.temperature"}, "refuses a parameter"),
        ("together", {"message": "The model m-1 does not exist"}, "takes no batch for this model"),
    ],
)
def test_a_refusal_that_every_row_would_get_stops_the_run_at_once_and_no_row_fails(
    engine: str, error: dict[str, Any], reason: str, server: Server, infer: Infer, write_jsonl: Write
) -> None:
    server.refuses = lambda job, lines: [error]
    data, keys = write_jsonl(conversations(12)), overrides(server, engine, "generation.temperature=0.5")
    with pytest.raises(Stopped, match=reason) as stopped:
        infer(data, *keys, engine=engine)
    assert len(server.submitted) == 1 and stopped.value.code == ErrorCode.REQUESTS_REFUSED
    for said in (error["message"], "engine.model=m-1", f"{server.url}{PATHS[engine]}"):
        assert said in str(stopped.value)
    server.refuses = lambda job, lines: []
    assert infer(data, *keys, engine=engine).exit_status == 0
    assert [row["response"] for row in infer.rows()] == [f"answer to: question {i}" for i in range(12)]
    assert [len(ids) for _, ids in server.submitted] == [12, 12]


def test_rows_with_a_model_of_their_own_fail_alone(server: Server, infer: Infer, write_jsonl: Write) -> None:
    server.refuses = lambda job, lines: [MODEL] if '"m-2"' in lines else []
    data = write_jsonl([*conversations(3), *(ask(f"other {i}", model="m-2") for i in range(3))])
    assert infer(data, *overrides(server, "openai"), engine="openai").exit_status == WITH_FAILURES
    assert [row["error"] and row["error"]["type"] for row in infer.rows()] == [None] * 3 + ["not_found"] * 3
    assert len(server.submitted) == 2


def test_a_row_with_a_parameter_of_its_own_fails_alone(server: Server, infer: Infer, write_jsonl: Write) -> None:
    def refuses(job: Job, lines: str) -> list[dict[str, Any]]:
        bad = [at for at, line in enumerate(lines.splitlines(), 1) if "temperature" in line]
        return [{**PARAMETER, "line": bad[0]}] if bad else []

    server.refuses = refuses
    rows = conversations(4)
    rows[2]["generation"] = {"temperature": 0.5}
    assert infer(write_jsonl(rows), *overrides(server, "openai"), engine="openai").exit_status == WITH_FAILURES
    assert [row["error"] and row["error"]["type"] for row in infer.rows()] == [None, None, "bad_request", None]
    assert [len(ids) for _, ids in server.submitted] == [4, 3]


def test_rows_of_a_model_without_batches_go_live_if_the_run_says_so(
    server: Server, infer: Infer, write_jsonl: Write
) -> None:
    server.refuses = lambda job, lines: [MODEL]
    keys = overrides(server, "openai", "run.batch_fallback=live")
    assert infer(write_jsonl(conversations(4)), *keys, engine="openai").exit_status == 0
    assert len(server.submitted) == 1 and len(server.live) == 4


# --- whose batch it is


@pytest.mark.parametrize("adopted", [False, True])
def test_a_batch_that_may_be_another_programs_is_not_cancelled(
    adopted: bool, server: Server, steps: Callable[[str], Steps], capfd: pytest.CaptureFixture[str]
) -> None:
    ours, server.delay_s = steps("anthropic"), 3600.0
    with load_engine("anthropic", model="m-1", base_url=f"{server.url}/v1") as engine:
        other = engine.infer_batch([ask(f"of another program {i}") for i in range(3)])
    server.not_made = 1
    ours.submit_unclear()
    if adopted:
        assert ours("fetch") == STOPPED and ours.batch.id == other
    capfd.readouterr()
    assert ours("cancel") == STOPPED
    said = " ".join(capfd.readouterr().err.split())
    assert f"engine.cancel_batch('{other}')" in said and "may be a batch of another program" in said
    assert server.jobs[other].cancelled is None
    server.jobs[other].delay_s = 0.0  # its results show whose it is
    assert ours.fetched() == WITH_FAILURES
    assert {row["error"]["type"] for row in ours.rows()} == {"cancelled"}
    assert list(server.jobs) == [other] and ours.batch.foreign == [other]  # a cancelled batch is not submitted again


@pytest.mark.parametrize("engine", ["openai", "anthropic", "together"])
def test_a_batch_whose_submission_had_no_answer_is_cancelled_if_it_has_our_name(
    engine: str, server: Server, steps: Callable[[str], Steps]
) -> None:
    ours, server.delay_s, server.fail_next = steps(engine), 3600.0, {"submit": 1}
    ours.submit_unclear()
    named = engine == "openai"
    assert ours("cancel") == (0 if named else STOPPED)
    [job] = server.jobs.values()
    assert (job.cancelled is not None) == named and ours.batch.guessed != named
    job.delay_s = 0.0
    assert ours.fetched() == (WITH_FAILURES if named else 0)
    assert not ours.batch.guessed and len(server.jobs) == 1


def test_a_cancelled_batch_that_the_provider_may_still_list_is_not_given_up(
    server: Server, steps: Callable[[str], Steps], capfd: pytest.CaptureFixture[str]
) -> None:
    ours, server.fail_next, server.delay_s = steps("openai"), {"submit": 1}, 3600.0
    ours.submit_unclear()
    server.listed = 0
    capfd.readouterr()
    assert ours("cancel", "run.batch_poll_s=600") == STOPPED
    assert "type the command again in" in " ".join(capfd.readouterr().err.split()) and ours.batch.open
    server.listed = None
    assert ours("cancel") == 0 and server.jobs[str(ours.batch.id)].cancelled is not None


# --- submitted again


def test_a_submission_after_a_full_queue_has_a_new_idempotency_key(
    server: Server, infer: Infer, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps_module, "QUEUE_S", 30.0)
    server.idempotent, server.batch_fate = True, lambda number: "ok" if number else "token_limit_exceeded"
    assert infer(write_jsonl(conversations(3)), *overrides(server, "openai"), engine="openai").exit_status == 0
    [name] = [path.stem for path in (infer.out / "_batches").iterdir()]
    assert server.sent_keys == [name, f"{name}-2"] and len(server.jobs) == 2


def test_a_submission_after_the_batch_of_another_program_has_a_new_idempotency_key(
    server: Server, steps: Callable[[str], Steps]
) -> None:
    ours = steps("anthropic")
    with load_engine("anthropic", model="m-1", base_url=f"{server.url}/v1") as engine:
        engine.infer_batch([ask(f"of another program {i}") for i in range(3)])
    server.sent_keys.clear()
    server.not_made = 1
    ours.submit_unclear()
    assert ours.fetched() == 0
    assert server.sent_keys == [ours.batch.name, f"{ours.batch.name}-2"] and len(server.jobs) == 2


def test_the_idempotency_key_stays_while_it_is_unclear_if_a_batch_was_made(
    server: Server, steps: Callable[[str], Steps]
) -> None:
    ours, server.not_made = steps("openai"), 1
    ours.submit_unclear()
    assert ours.fetched() == 0
    assert server.sent_keys == [ours.batch.name] * 2


def test_the_provider_has_time_to_list_the_batch_of_each_unclear_submission(
    server: Server, steps: Callable[[str], Steps]
) -> None:
    ours, server.not_made = steps("openai"), 1
    ours.submit_unclear()
    server.listed = 0
    server.fail_next = {"submit": 1}  # made, and its answer is lost
    saved = json.loads(ours.file.read_text())
    times = {name: saved[name] - 1000 for name in ("submitting_at", "tried_at") if name in saved}
    ours.file.write_text(json.dumps({**saved, **times}))
    for _ in range(3):  # the first one submits, and the others wait
        assert ours("fetch", "run.batch_poll_s=600") == STOPPED and len(server.jobs) == 1
    server.listed = None
    assert ours.fetched() == 0 and len(server.jobs) == 1


def test_a_failed_submission_is_not_taken_for_a_later_one_that_is_listed_late(
    server: Server, steps: Callable[[str], Steps]
) -> None:
    ours, server.batch_fate = steps("openai"), lambda number: "ok" if number else "token_limit_exceeded"
    assert ours("submit", "run.batch_poll_s=600") == STOPPED and len(server.jobs) == 1
    server.listed, server.fail_next = 1, {"submit": 1}
    for _ in range(3):
        assert ours("fetch", "run.batch_poll_s=600") == STOPPED and len(server.jobs) == 2
    server.listed = None
    assert ours.fetched() == 0 and len(server.jobs) == 2


def test_a_batch_of_an_earlier_version_goes_on(server: Server, steps: Callable[[str], Steps]) -> None:
    ours, server.fail_next = steps("openai"), {"submit": 1}
    ours.submit_unclear()
    server.listed = 0
    saved = json.loads(ours.file.read_text())
    old = {name: saved[name] for name in saved if name not in ("submission", "tried_at", "guessed")}
    ours.file.write_text(json.dumps(old))
    assert ours("fetch", "run.batch_poll_s=600") == STOPPED and len(server.jobs) == 1  # `submitting_at` has the time
    server.listed = None
    assert ours.fetched() == 0 and server.sent_keys == [ours.batch.name]


# --- rate limits


def test_rate_limits_are_waited_for(
    server: Server, infer: Infer, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "PATIENCE_S", 0.0)
    server.limited = 3
    server.refuses = lambda job, lines: [] if job.number else [{"code": "rate_limit_exceeded", "message": "slow down"}]
    assert infer(write_jsonl(conversations(3)), *overrides(server, "openai"), engine="openai").exit_status == 0
    assert [row["attempts"] for row in infer.rows()] == [1] * 3
