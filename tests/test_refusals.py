"""A mistake that would fail every row stops the run after the first requests, and no row is recorded as failed."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from aiohttp import web

from engines.errors import ConfigError, ErrorCode
from jobs.reading import open_output
from jobs.status import look
from pipeline.errors import Stopped
from pipeline.run import WITH_FAILURES
from tests.support.infer import Infer, ask
from tests.support.marks import slow
from tests.support.provider_server import ProviderServer

Write = Callable[..., Path]
KEY = "sk-0123456789-the-right-key"
# A misspelt key, model and URL, and a parameter that the model does not take: (what is wrong, what mends it)
MISTAKES = {
    "key": ("engine.api_key_env=WRONG_KEY", "engine.api_key_env=RIGHT_KEY"),
    "account": ("engine.api_key_env=EMPTY_ACCOUNT", "engine.api_key_env=RIGHT_KEY"),
    "model": ("engine.model=gpt-misspelt", "engine.model=gpt-right"),
    "url": ("engine.base_url={url}/v2/chat/completions", "engine.base_url={url}/v1/chat/completions"),
    "parameter": ("generation.temperature=0.5", "generation.temperature=null"),
    "parameter without a code": ("generation.top_k=5", "generation.top_k=null"),
}
RIGHT = [right for _, right in MISTAKES.values()]


class StrictServer(ProviderServer):
    """Refuses mistakes with OpenAI's words, and counts the requests."""

    count = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.count += 1
        body: dict[str, Any] = await request.json()
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key == "sk-0123456789-an-empty-account":
            return refusal(429, "You exceeded your current quota", type="insufficient_quota", code="insufficient_quota")
        if key != KEY:
            return refusal(401, "Incorrect API key provided", code="invalid_api_key")
        if request.path != "/v1/chat/completions":
            return web.json_response({"detail": "Not Found"}, status=404)
        if body["model"] != "gpt-right":
            text = f"The model `{body['model']}` does not exist or you do not have access to it."
            return refusal(404, text, code="model_not_found")
        if "temperature" in body:
            return refusal(400, "Unsupported value", param="temperature", code="unsupported_value")
        if "top_k" in body:
            return refusal(400, "top_k: Extra inputs are not permitted")
        return await super().handle(request)


def refusal(status: int, message: str, **more: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "invalid_request_error", **more}}, status=status)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
    with StrictServer(keep=False) as running:
        running.latency_s = 0.002
        yield running


KEYS = {
    "RIGHT_KEY": KEY,
    "WRONG_KEY": "sk-0123456789-a-wrong-key",
    "EMPTY_ACCOUNT": "sk-0123456789-an-empty-account",
}


def overrides(server: StrictServer, *more: str) -> list[str]:
    return [text.format(url=server.url) for text in (*RIGHT, *more)]


def rows(count: int) -> list[dict[str, Any]]:
    return [ask(f"row {i}", id=str(i)) for i in range(count)]


def recorded(out: Path) -> int:
    """Records that answer a row, failed or not."""
    tables = [pq.read_table(path) for path in (out / "_segments").rglob("*.parquet")]
    return sum(table["superseded"].to_pylist().count(False) for table in tables)


@pytest.mark.parametrize("mistake", [name if name in ("key", "parameter") else slow(name) for name in MISTAKES])
def test_a_mistake_stops_the_run_at_once_and_every_row_stays_open(
    mistake: str, infer: Infer, write_jsonl: Write, server: StrictServer
) -> None:
    data = write_jsonl(rows(1000))
    with pytest.raises(Stopped) as stopped:
        infer(data, *overrides(server, MISTAKES[mistake][0]), engine="openai_compatible")
    assert server.count <= 128
    assert recorded(infer.out) == 0
    model = "gpt-misspelt" if mistake == "model" else "gpt-right"
    path = "/v2/chat/completions" if mistake == "url" else "/v1/chat/completions"
    assert f"at {server.url}{path} with engine.model={model}" in str(stopped.value)
    code = {"key": ErrorCode.KEY_REFUSED, "account": ErrorCode.ACCOUNT_EMPTY}.get(mistake, ErrorCode.REQUESTS_REFUSED)
    assert stopped.value.code == code
    before = server.count
    assert infer(data, *overrides(server), engine="openai_compatible").exit_status == 0
    assert server.count == before + 1000
    assert [row["response"] for row in infer.rows()] == [f"row {i}" for i in range(1000)]


def with_fallback(second: ProviderServer) -> str:
    return f"engine.fallback=[{{{{engine: openai_compatible, model: second, base_url: '{second.url}'}}}}]"


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_first_engine_does_not_send_all_rows_to_its_fallback(
    mistake: str, infer: Infer, write_jsonl: Write, server: StrictServer
) -> None:
    with ProviderServer() as second:
        with pytest.raises(Stopped) as stopped:
            more = (MISTAKES[mistake][0], with_fallback(second))
            infer(write_jsonl(rows(1000)), *overrides(server, *more), engine="openai_compatible")
        # Without a code, only 20 equal errors show that no row is the cause; 128 rows are in the engine.
        assert server.count <= (256 if mistake == "parameter without a code" else 128)
        assert len(second.requests) <= (256 if mistake == "parameter without a code" else 0)
        assert recorded(infer.out) == len(second.requests)
    path = "/v2/chat/completions" if mistake == "url" else "/v1/chat/completions"
    assert f"engine=openai_compatible at {server.url}{path} with engine.model=gpt-" in str(stopped.value)
    code = {"key": ErrorCode.KEY_REFUSED, "account": ErrorCode.ACCOUNT_EMPTY}.get(mistake, ErrorCode.REQUESTS_REFUSED)
    assert stopped.value.code == code


def test_answers_of_a_fallback_do_not_show_that_the_first_engine_works(
    infer: Infer, write_jsonl: Write, server: StrictServer
) -> None:
    """Most rows name a model of their own, which the first engine refuses: the fallback answers them."""
    data = [{**row, **({"model": "gpt-gated"} if i % 8 != 7 else {})} for i, row in enumerate(rows(40))]
    with ProviderServer() as second:
        more = (MISTAKES["model"][0], with_fallback(second), "engine.max_concurrency=1")
        with pytest.raises(Stopped) as stopped:
            infer(write_jsonl(data), *overrides(server, *more), engine="openai_compatible")
        assert recorded(infer.out) == len(second.requests)
    assert "engine.model=gpt-misspelt" in str(stopped.value)


@pytest.mark.slow
def test_refused_rows_and_an_account_that_becomes_empty_go_to_the_fallback(
    infer: Infer, write_jsonl: Write, server: StrictServer
) -> None:
    empty = "say=400=Your credit balance is too low to access the Anthropic API."
    server.plan = {"row 0": ["say=403=your prompt was flagged as potentially violating our usage policy"]}
    server.fault = lambda text, attempt: empty if int(text.split()[1]) > 22 else None
    data = [{**row, **({"model": "gpt-gated"} if i == 1 else {})} for i, row in enumerate(rows(40))]
    data[2]["generation"] = {"temperature": 0.5}
    with ProviderServer() as second:
        more = (with_fallback(second), "engine.max_concurrency=1")
        assert infer(write_jsonl(data), *overrides(server, *more), engine="openai_compatible").exit_status == 0
        assert sorted(second.texts()) == sorted(f"row {i}" for i in (0, 1, 2, *range(23, 40)))
    assert [row["response"] for row in infer.rows()] == [f"row {i}" for i in range(40)]


@pytest.mark.slow
def test_an_outage_goes_to_the_fallback(infer: Infer, write_jsonl: Write, server: StrictServer) -> None:
    with ProviderServer() as second:
        more = ("engine.base_url=http://127.0.0.1:9/v1", "engine.max_retries=0", "run.max_outage_s=1")
        data = write_jsonl(rows(30))
        outcome = infer(data, *overrides(server, *more, with_fallback(second)), engine="openai_compatible")
        assert outcome.exit_status == 0 and len(second.requests) == 30


@pytest.mark.slow
def test_a_hundred_thousand_rows_send_as_few(server: StrictServer, tmp_path: Path, write_jsonl: Write) -> None:
    """The whole command, with 64 in flight and what it needs of Ray."""
    data = write_jsonl(rows(100_000))
    args = overrides(server, f"dataset.path={data}", f"output.path={tmp_path}/out", "engine.max_concurrency=64")
    for mistake in ("key", "model", "url", "parameter"):
        before = server.count
        command = [
            sys.executable,
            "-m",
            "jobs.infer",
            "engine=openai_compatible",
            *args,
            *overrides(server, MISTAKES[mistake][0])[-1:],
        ]
        env = {**os.environ, **KEYS}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 4, done.stderr
        assert 0 < server.count - before <= 128, mistake
    assert recorded(tmp_path / "out") == 0


def test_a_refused_row_or_model_among_others_fails_alone(infer: Infer, write_jsonl: Write, server: StrictServer) -> None:
    flagged = "your prompt was flagged as potentially violating our usage policy"
    server.plan = {f"row {i}": [f"say=403={flagged}"] for i in (0, 7)}
    data = write_jsonl([{**row, **({"model": "gpt-gated"} if i % 4 == 3 else {})} for i, row in enumerate(rows(40))])
    outcome = infer(data, *overrides(server), engine="openai_compatible")
    assert outcome.exit_status == WITH_FAILURES
    errors = [row["error"] and row["error"]["type"] for row in infer.rows()]
    expected = ["not_found" if i % 4 == 3 else "content_filter" if i == 0 else None for i in range(40)]
    assert errors == expected


@pytest.mark.slow
def test_rows_with_different_errors_fail_each_for_itself(infer: Infer, write_jsonl: Write, server: StrictServer) -> None:
    server.fault = lambda text, attempt: f"say=400=the image of {text} is broken"
    outcome = infer(write_jsonl(rows(30)), *overrides(server), engine="openai_compatible")
    assert outcome.exit_status == WITH_FAILURES and outcome.manifest["rows"]["failed"] == 30


@pytest.mark.slow
def test_rows_that_all_fail_alike_are_recorded_if_the_user_says_so(
    infer: Infer, write_jsonl: Write, server: StrictServer
) -> None:
    server.fault = lambda text, attempt: "say=400=no image"
    data = write_jsonl(rows(30))
    with pytest.raises(Stopped, match=r"the first 2\d requests are all refused with the same error.*run.max_error_rate=1"):
        infer(data, *overrides(server), engine="openai_compatible")
    assert infer(data, *overrides(server, "run.max_error_rate=1"), engine="openai_compatible").exit_status == WITH_FAILURES
    assert [row["error"]["type"] for row in infer.rows()] == ["bad_request"] * 30


def test_a_few_rows_that_all_fail_alike_are_recorded(infer: Infer, write_jsonl: Write, server: StrictServer) -> None:
    server.fault = lambda text, attempt: "say=400=no image"
    more = ["engine.max_concurrency=1"]
    assert infer(write_jsonl(rows(9)), *overrides(server, *more), engine="openai_compatible").exit_status == WITH_FAILURES


@pytest.mark.slow
def test_money_that_runs_out_in_the_middle_stops_the_run_and_loses_no_row(
    infer: Infer, write_jsonl: Write, server: StrictServer
) -> None:
    answers = itertools.count()
    empty = "say=400=Your credit balance is too low to access the Anthropic API."
    server.fault = lambda text, attempt: None if next(answers) < 300 else empty
    data = write_jsonl(rows(1000))
    with pytest.raises(Stopped, match="the account has no money") as stopped:
        infer(data, *overrides(server), engine="openai_compatible")
    assert stopped.value.code == ErrorCode.ACCOUNT_EMPTY
    assert recorded(infer.out) == 300 and server.count <= 300 + 128
    before, server.fault = server.count, lambda text, attempt: None
    assert infer(data, *overrides(server), engine="openai_compatible").exit_status == 0
    assert server.count == before + 700 and [row["error"] for row in infer.rows()] == [None] * 1000


def test_a_key_that_is_refused_once_by_chance_fails_one_row(infer: Infer, write_jsonl: Write, server: StrictServer) -> None:
    server.plan = {"row 500": ["401"]}
    outcome = infer(write_jsonl(rows(1000)), *overrides(server), engine="openai_compatible")
    assert outcome.exit_status == WITH_FAILURES and outcome.manifest["errors"] == {"auth": 1}


def test_one_row_at_an_address_where_nobody_listens_stays_open(
    infer: Infer, write_jsonl: Write, server: StrictServer
) -> None:
    more = ["engine.base_url=http://127.0.0.1:9/v1", "engine.max_retries=1"]
    with pytest.raises(Stopped, match="no server has ever answered at engine.base_url .*127.0.0.1:9/v1/chat"):
        infer(write_jsonl(rows(1)), *overrides(server, *more), engine="openai_compatible")
    assert recorded(infer.out) == 0


@pytest.mark.slow
def test_a_wait_of_a_day_is_told_and_ends_the_run(
    infer: Infer, write_jsonl: Write, server: StrictServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.monitor.run_state.EVERY_S", 0.2)
    server.fault = lambda text, attempt: "429-after=86400"
    told: set[str] = set()
    over = threading.Event()

    def look_at_status() -> None:
        while not over.wait(0.2):
            with contextlib.suppress(ConfigError):  # nothing is written yet
                told.add(str(look(open_output(str(infer.out))).get("trouble")))

    watcher = threading.Thread(target=look_at_status)
    watcher.start()
    more = ["run.max_outage_s=15", "run.progress_s=0.2"]
    try:
        with pytest.raises(Stopped, match="has not answered for .*HTTP 429: slow down") as stopped:
            infer(write_jsonl(rows(500)), *overrides(server, *more), engine="openai_compatible")
    finally:
        over.set()
        watcher.join()
    assert stopped.value.code == ErrorCode.SERVER_OUTAGE
    wait = "The server asks for a wait of 1 day, 0:00:00. Without an answer the run stops after 0:00:15"
    assert wait in infer.printed and any(wait in text for text in told)
    assert recorded(infer.out) == 0
