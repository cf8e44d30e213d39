"""The remote engine, alone, against a server that speaks the three wires and misbehaves."""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engines.remote.concurrency
import engines.remote.sender
from engines import Completion, load_engine
from engines.base import Engine
from engines.config import EngineConfig
from engines.errors import ConfigError
from engines.free_port import free_port
from engines.params import GenerationParams
from engines.remote.auth import Auth
from engines.remote.concurrency import AdaptiveSemaphore, RetryBudget
from engines.remote.errors import failure, observed, retry_after
from engines.remote.rate_limits import SLACK_S, Limits, RateLimiter, Reservation, ReserveRequest
from engines.types import Request, to_request
from tests.support.google_account import google_account
from tests.support.infer import ask
from tests.support.provider_server import PASSING, STATUSES, ProviderServer

KEY = "sk-0123456789-a-key-that-nobody-may-see"
WIRES = ["openai_compatible", "anthropic", "bedrock"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are short, and the clouds' credentials are there."""
    monkeypatch.setattr(engines.remote.sender, "BACKOFF_FIRST_S", 0.005)
    monkeypatch.setattr(engines.remote.concurrency, "PROBE_FIRST_S", 0.02)
    monkeypatch.setattr(engines.remote.concurrency, "PROBE_MOST_S", 0.05)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("AWS_REGION", "us-east-1")


Load = Callable[..., Engine]


@pytest.fixture
def load(server: ProviderServer) -> Iterator[Load]:
    """Engines that ask the server, closed at the end."""
    loaded: list[Engine] = []

    def one(kind: str = "openai_compatible", **keys: Any) -> Engine:
        loaded.append(load_engine(kind, **{"model": "m", "base_url": server.url, "timeout_s": 5.0, **keys}))
        return loaded[-1]

    yield one
    for engine in loaded:
        engine.close()


def infer(engine: Engine, *texts: str) -> list[Completion]:
    return engine.infer([ask(text) for text in texts])


# -- what goes wrong with one request -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WIRES)
def test_what_passes_is_asked_again_and_what_does_not_is_not(server: ProviderServer, load: Load, kind: str) -> None:
    passing = [fault for fault in PASSING if not (kind == "bedrock" and fault in ("error-200", "bad-gzip", "hang"))]
    for fault in (*passing, *STATUSES):
        server.plan[fault] = [fault]
    engine = load(kind, timeout_s=3.0)
    for fault, done in zip(passing, infer(engine, *passing), strict=True):
        assert (done.text, done.error) == (fault, None), fault
        assert done.attempts == server.attempts[fault] == 2, fault
    for status in ("400", "401", "402", "404", "413", "501"):
        server.plan[status] = [status]
        (done,) = infer(engine, status)
        assert done.error is not None, status
        assert (done.error.status, done.error.retryable, done.attempts) == (int(status), False, 1)
        assert server.attempts[status] == 1


@pytest.mark.parametrize(
    ("fault", "status", "type"),
    [("say=400=maximum context length is 8192 tokens", 400, "context_length"), ("413", 413, "bad_request"),
     ("say=429=Request too large for gpt-4o on tokens per min (TPM): Limit 100", 429, "context_length"),
     ("say=429=You exceeded your current quota, please check your plan", 429, "auth"), ("402", 402, "auth"),
     ("say=400=blocked by our content policy", 400, "content_filter"), ("404", 404, "not_found"), ("401", 401, "auth"),
     ("say=403=forbidden", 403, "auth"), ("501", 501, "bad_request"), ("refusal", None, "content_filter")],
)  # fmt: skip
def test_errors_have_types(server: ProviderServer, load: Load, fault: str, status: int | None, type: str) -> None:
    server.plan["x"] = [fault]
    (done,) = infer(load(), "x")
    assert done.error is not None
    assert (done.error.type, done.error.status, done.error.retryable) == (type, status, False)


def test_a_row_that_keeps_failing_ends_after_max_retries(server: ProviderServer, load: Load) -> None:
    server.fault = lambda text, attempt: "500" if text == "bad" else None
    bad, good = infer(load(max_retries=3), "bad", "good")
    assert bad.error is not None
    assert (bad.error.type, bad.error.status, bad.attempts) == ("server", 500, 4)
    assert good.text == "good"


def test_odd_answers_are_read(server: ProviderServer, load: Load) -> None:
    for fault in ("gzip", "slow", "content-type", "length"):
        server.plan[fault] = [fault]
        (done,) = infer(load(), fault)
        assert (done.text, done.attempts, done.finish_reason) == (fault, 1, "length" if fault == "length" else "stop")


def test_an_answer_that_the_server_broke_off_is_asked_again_and_paid(server: ProviderServer, load: Load) -> None:
    def said(finish: str | None, **more: Any) -> str:
        choice = {"index": 0, "message": {"role": "assistant", "content": "half"}, "finish_reason": finish, **more}
        return "body=" + json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})

    broken = [
        said("error"),
        said("abort"),
        said("stop", error={"code": 502, "message": "x"}),
    ]
    server.plan["x"] = [*broken, said("stop")]
    (done,) = infer(load(max_retries=len(broken)), "x")
    assert (done.text, done.attempts, done.finish_reason, done.usage.output) == ("half", 4, "stop", 20)
    server.fault = lambda text, attempt: said("error")  # of every row: the server works all the same
    for done in infer(load(max_retries=1), *map(str, range(20))):
        assert done.error is not None and "broke off" in done.error.message
        assert (done.attempts, done.usage.output) == (2, 10)
    for reason, words in (("of tomorrow", "'of tomorrow'"), ("", "no finish reason"), (None, "no finish reason")):
        server.fault = lambda text, attempt, reason=reason: said(reason)  # type: ignore[misc]
        done, _ = infer(load(), str(reason), "b")
        assert done.error is not None and words in done.error.message
        assert (done.error.retryable, done.attempts, done.usage.output) == (False, 1, 5)


def test_an_answer_of_100_mb_is_given_up(server: ProviderServer, load: Load) -> None:
    server.plan["x"] = ["huge"]
    (done,) = infer(load(max_retries=0, timeout_s=60), "x")
    assert done.error is not None
    assert done.error.type == "bad_response"
    assert "longer than 64 MiB" in done.error.message


def test_the_key_is_cut_from_errors_and_goes_nowhere_by_redirect(server: ProviderServer, load: Load) -> None:
    server.key = "another"
    (done,) = infer(load("openai"), "x")
    assert done.error is not None
    assert done.error.message == "HTTP 401: Incorrect API key provided: ***"
    headers = {"authorization": "Bearer sk-of-a-header-0123456789", "x-api-key": "sk-of-a-header-0123456789"}
    for name, value in headers.items():
        (done,) = infer(load(headers={name: value}), "x")
        assert done.error is not None and done.error.message == "HTTP 401: Incorrect API key provided: ***"
    with ProviderServer() as elsewhere:
        server.key = None
        server.plan["y"] = ["redirect"]
        (done,) = infer(load("openai", headers={"x-redirect": f"{elsewhere.url}/v1/chat/completions"}), "y")
        assert done.error is not None
        assert "redirects are not followed" in done.error.message
        assert not elsewhere.times


@pytest.mark.parametrize("length", [12, 20, 25])
def test_the_beginning_of_a_key_at_the_end_of_a_cut_text_is_removed_too(length: int) -> None:
    key = "sk-proj-0123456789abcdefg"
    auth = Auth({}, key)
    assert auth.clean(f"the key {key[:length]}") == "the key ***"
    assert auth.clean(f"{key[:length]}, {key} and sk-proj-***") == "***, *** and sk-proj-***"


def test_every_part_of_a_header_with_secrets_is_removed(load: Load) -> None:
    engine: Any = load(
        headers={"Cookie": "session=0123456789; user=ann; id=abcdefghij", "api-key": "short", "x-trace": "on"}
    )
    said = "session=0123456789; user=ann; id=abcdefghij, short, on"
    assert engine.auth.clean(said) == "*** *** ***, ***, on"


def test_retry_after_is_a_floor(server: ProviderServer, load: Load) -> None:
    server.plan |= {"a": ["429-after=0.6"], "b": ["503-date=2"]}
    before = time.time()
    infer(load(), "a", "b")
    times = {text: [seen.at for seen in server.requests if seen.text == text] for text in ("a", "b")}
    assert times["a"][1] - times["a"][0] >= 0.6
    assert time.time() >= int(before) + 2  # the date had whole seconds


def test_rows_that_wait_for_another_try_hold_no_slot(server: ProviderServer, load: Load) -> None:
    server.plan = {f"bad {i}": ["500-after=2"] for i in range(2)}
    engine = load(max_concurrency=2)
    done = infer(engine, "bad 0", "bad 1", *(f"row {i}" for i in range(50)))
    assert all(completion.error is None for completion in done)
    # Both slots' first rows failed, and the slots took the next rows at once.
    assert sorted(server.texts()[:4]) == ["bad 0", "bad 1", "row 0", "row 1"]
    assert server.most_busy <= 2


def test_an_idempotency_key_is_kept_over_the_tries_of_a_row(server: ProviderServer, load: Load) -> None:
    server.plan["a"] = ["500", "reset"]
    infer(load("openai"), "a", "b")
    keys = [(seen.text, seen.headers["idempotency-key"]) for seen in server.requests]
    assert len(keys) == 4
    assert len(set(keys)) == 2


def test_infer_works_twice_on_one_engine(server: ProviderServer, load: Load) -> None:
    engine = load(requests_per_minute=60_000)
    for text in ("a", "b"):
        server.plan[text] = ["500"]
        (done,) = infer(engine, text)
        assert (done.text, done.attempts) == (text, 2)


# -- many requests -----------------------------------------------------------------------------------------------------


def test_overload_halves_what_is_in_flight_and_answers_let_it_grow_back(server: ProviderServer, load: Load) -> None:
    server.latency_s = 0.01
    engine: Any = load(max_concurrency=16)
    server.fault = lambda text, attempt: "429" if attempt == 1 and text in ("row 3", "row 40") else None
    done = infer(engine, *(f"row {i}" for i in range(60)))
    assert all(completion.error is None for completion in done)
    assert engine.remote.semaphore.threshold < 16
    infer(engine, *(f"more {i}" for i in range(800)))
    assert engine.remote.semaphore.limit == 16


def test_other_errors_do_not_shrink_it(server: ProviderServer, load: Load) -> None:
    engine: Any = load(max_concurrency=8)
    server.fault = lambda text, attempt: {0: "500", 1: "400", 2: "reset"}.get(int(text) % 10) if attempt == 1 else None
    infer(engine, *map(str, range(100)))
    assert engine.remote.semaphore.limit == 8


@given(maximum=st.integers(1, 9), steps=st.lists(st.sampled_from(["take", "answer", "overload"]), max_size=60))
def test_slots_are_never_more_than_their_limit(maximum: int, steps: list[str]) -> None:
    async def go() -> None:
        semaphore, took = AdaptiveSemaphore(maximum), list[asyncio.Task[None]]()
        for step in steps:
            if step == "take":
                took.append(asyncio.create_task(semaphore.take()))
            elif semaphore.used:
                if step == "answer":
                    semaphore.answered()
                else:
                    semaphore.overloaded(time.monotonic())
                semaphore.release()
            before = semaphore.used
            await asyncio.sleep(0)
            assert 1 <= semaphore.limit <= maximum
            assert semaphore.used <= max(before, int(semaphore.limit))
        for task in took:
            task.cancel()

    asyncio.run(go())


def test_a_dead_server_is_only_probed_until_the_outage_is_said(load: Load, server: ProviderServer) -> None:
    server.fault = lambda text, attempt: "502"
    engine = load(max_concurrency=32)
    engine.remote.max_outage_s = 0.5
    done = infer(engine, *(f"row {i}" for i in range(64)))
    assert engine.remote.outage is not None
    assert "HTTP 502" in engine.remote.outage
    assert all(completion.error and completion.error.retryable for completion in done)
    # 64 rows would have made 6 requests each: here, those in flight at first, and then one at a time.
    assert len(server.times) < 32 + 60


def test_rows_wait_out_an_outage(server: ProviderServer, load: Load) -> None:
    server.fault = lambda text, attempt: "503" if len(server.times) < 40 else None
    engine = load(max_concurrency=16, max_retries=2)
    done = infer(engine, *(f"row {i}" for i in range(40)))
    assert [completion.text for completion in done] == [f"row {i}" for i in range(40)]
    assert engine.remote.outage is None


def test_retries_have_a_budget() -> None:
    budget = RetryBudget(share=0.2, least_per_s=0.01, maximum=10)
    waits = [budget.take() for _ in range(7)]
    assert waits[:5] == [0] * 5 and all(50 < wait <= 100 for wait in waits[5:])
    for _ in range(5):
        budget.answered(retried=False)
    assert budget.take() == 0 and budget.take() > 0
    budget.answered(retried=True)
    assert budget.take() == 0
    for _ in range(200):
        budget.answered(retried=False)
    assert budget.tokens == 10


def test_rows_that_were_refused_together_come_back_as_fast_as_they_are_answered(server: ProviderServer, load: Load) -> None:
    server.fault = lambda text, attempt: "429" if attempt == 1 else None
    engine = load(max_concurrency=200)
    engine.remote.retries.least_per_s = 1e-6  # no retry but those that are left or given back
    done = infer(engine, *(f"row {i}" for i in range(200)))
    assert all(completion.error is None for completion in done) and len(server.times) == 400


def test_the_time_in_the_queue_does_not_count_as_time_of_failures(server: ProviderServer, load: Load) -> None:
    """A row that waits for a rate limit for long has its retries all the same."""
    server.fault = lambda text, attempt: "500" if attempt == 1 else None
    engine = load(requests_per_minute=240)
    engine.remote.max_outage_s = 0.3
    done = infer(engine, *(f"row {i}" for i in range(8)))
    assert [completion.attempts for completion in done] == [2] * 8
    assert all(completion.error is None for completion in done)


def test_a_dead_endpoint_is_left_out_and_comes_back(server: ProviderServer, load: Load) -> None:
    port = free_port()
    engine: Any = load(base_url=[server.url, f"http://127.0.0.1:{port}"], max_retries=10, max_concurrency=8)
    done = infer(engine, *(f"row {i}" for i in range(200)))
    assert all(completion.error is None for completion in done)
    assert engine.endpoints.all[1].open
    with ProviderServer(port=port) as second:
        while engine.endpoints.all[1].open:
            infer(engine, *(f"more {i}" for i in range(8)))
        second.latency_s = server.latency_s = 0.02
        infer(engine, *(f"again {i}" for i in range(40)))
        assert len(second.times) >= 10  # the least busy one is asked: about half of them


def test_what_fails_for_good_or_is_refused_goes_to_the_fallback(server: ProviderServer, load: Load) -> None:
    server.plan |= {"a": ["400"], "b": ["refusal"], "c": ["content_filter"]}
    engine = load(fallback=[{"engine": "anthropic", "model": "claude-haiku-4-5", "base_url": server.url}, "echo"])
    done = infer(engine, "a", "b", "c", "d")
    assert [completion.text for completion in done] == ["a", "b", "c", "d"]
    assert [completion.engine for completion in done] == ["anthropic"] * 3 + ["openai_compatible"]
    assert [completion.attempts for completion in done] == [2, 2, 2, 1]
    server.fault = lambda text, attempt: "400"
    assert infer(engine, "e")[0].engine == "echo"


def test_drain_gives_back_what_waits(server: ProviderServer, load: Load) -> None:
    server.fault = lambda text, attempt: "500-after=60" if text == "later" else None
    engine = load(requests_per_minute=60)

    async def go() -> list[Completion]:
        base = GenerationParams()
        tasks = [asyncio.create_task(engine.generate(to_request(ask(text), base))) for text in ("later", *"abcdefgh")]
        while not server.attempts["later"]:
            await asyncio.sleep(0.01)
        engine.remote.drain()
        return await asyncio.gather(*tasks)

    done = asyncio.run(go())
    ended = [completion.error.type for completion in done if completion.error]
    assert set(ended) == {"cancelled"}
    assert done[0].error is not None
    assert len(server.times) + len(ended) == 9 + 1  # "later" was asked, and given back


# -- limits -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=40)
@given(rate=st.integers(60, 60_000), late=st.lists(st.floats(0, SLACK_S), min_size=8, max_size=8), dies=st.booleans())
def test_no_minute_has_more_than_the_limit_and_little_is_wasted(rate: int, late: list[float], dies: bool) -> None:
    """A client that always wants to send, and is late by anything up to the slack."""
    now = [0.0]
    limiter = RateLimiter({"requests": rate}, clock=lambda: now[0])
    sent: list[tuple[float, int]] = []
    step = 0
    while now[0] < 130:
        reservation = limiter.reserve([(1.0, 1.0)] * 512)
        if reservation.granted:
            sent.append((now[0], reservation.granted))
        now[0] += max(reservation.wait_s, 0.02) + late[step % len(late)] * (step % 3 == 0)
        step += 1
        if dies and step == 50:
            limiter = RateLimiter({"requests": rate}, clock=lambda: now[0])
    for begin, _ in sent:
        assert sum(count for at, count in sent if begin <= at < begin + 60) <= rate + (dies and rate * SLACK_S / 60 + 1)
    if not dies and not any(late):
        assert sum(count for at, count in sent if at < 120) >= 0.97 * 2 * rate - 1


def test_tokens_are_reserved_and_given_back() -> None:
    now = [0.0]
    limiter = RateLimiter({"output_tokens": 6100}, clock=lambda: now[0])  # 100 a second
    assert limiter.reserve([(10, 1000)]).granted == 1
    held = limiter.reserve([(10, 1000)])
    assert held.granted == 0
    assert 8 < held.wait_s < 11
    now[0] += 0.11
    assert limiter.reserve([(10, 1000)], back=(0, 990)).granted == 1  # the first had used 10 only, a tenth of a second


def test_a_lower_limit_in_the_headers_counts_and_a_pause_holds_all() -> None:
    now = [0.0]
    limiter = RateLimiter({"requests": 6000}, clock=lambda: now[0])
    limiter.learn({"requests": 60, "input_tokens": 1000})
    limiter.learn({"requests": 9000})
    assert {name: rate.per_minute for name, rate in limiter.rates.items()} == {"requests": 60, "input_tokens": 1000}
    limiter.pause(5)
    assert limiter.reserve([(1, 1)]) == Reservation(0, 5.0)


def test_those_who_wait_are_served_in_their_order() -> None:
    async def go() -> list[int]:
        limits, order = Limits(EngineConfig("x")), list[int]()
        granted = iter([Reservation(2), Reservation(0, 0.01), Reservation(1), Reservation(100)])

        async def source(model: str, call: ReserveRequest) -> Reservation:
            return next(granted)

        async def one(number: int) -> None:
            await limits.take("m", (1, 1))
            order.append(number)

        limits.source = source
        await asyncio.gather(*(one(i) for i in range(20)))
        return order

    assert asyncio.run(go()) == list(range(20))


@pytest.mark.parametrize(
    ("headers", "pause", "limits"),
    [({"x-ratelimit-limit-requests": "9", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"},
      60.0, {"requests": 9}),
     ({"x-ratelimit-limit-tokens": "9", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "120ms"}, 0.12,
      {"input_tokens": 9}),
     ({"x-ratelimit-limit-tokens": "", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m2.5s"}, 60.0,
      {}),
     ({"x-ratelimit-limit-requests": "500", "x-ratelimit-remaining-requests": "3"}, 0.0, {"requests": 500}),
     ({"x-ratelimit-limit-requests": "-1", "x-ratelimit-limit-tokens": "0"}, None, None),
     ({"anthropic-ratelimit-output-tokens-limit": "8000"}, 0.0, {"output_tokens": 8000}),
     ({"x-ratelimit-limit-requests": "many", "x-ratelimit-reset-requests": "soon"}, None, None)],
)  # fmt: skip
def test_headers_that_tell_limits(headers: dict[str, str], pause: float | None, limits: dict[str, float] | None) -> None:
    found = observed(headers)
    assert (found and (found.pause_s, found.limits)) == (None if pause is None else (pause, limits))


def test_retry_after_as_seconds_and_as_a_date() -> None:
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after-ms": "250"}) == 0.25
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": formatdate(time.time() - 100, usegmt=True)}) == 0
    ahead = retry_after({"retry-after": formatdate(time.time() + 100, usegmt=True)})
    assert ahead is not None
    assert 0 < ahead <= 100


@given(status=st.integers(300, 599), content=st.binary(max_size=200) | st.recursive(
    st.none() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(["error", "message", "code", "detail", "type"]), inner)).map(lambda v: json.dumps(v).encode()),
)  # fmt: skip
def test_any_failure_has_a_type_and_one_line(status: int, content: bytes) -> None:
    error = failure(status, content, {})
    assert error.status == status
    assert "\n" not in str(error)


# -- particulars --------------------------------------------------------------------------------------------------------


def test_a_proxy_of_the_environment_is_used(server: ProviderServer, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.path)
            self.rfile.read(int(self.headers["content-length"]))
            answer = {"choices": [{"message": {"content": "through the proxy"}, "finish_reason": "stop"}]}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
    try:
        (done,) = infer(load(base_url="http://provider.invalid/v1"), "x")
        assert done.text == "through the proxy"
        assert seen == ["http://provider.invalid/v1/chat/completions"]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert infer(load(), "y")[0].text == "y"
    finally:
        proxy.shutdown()
        proxy.server_close()


def test_vertex_fetches_a_token_once_and_again_when_it_is_refused(
    load: Load, server: ProviderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROJECT_ID", "p")
    monkeypatch.setenv("REGION", "europe-west4")
    url = f"{server.url}/v1beta1/projects/{{project_id}}/locations/{{region}}/endpoints/openapi"
    with google_account(tmp_path) as (file, tokens):
        engine: Any = load("vertex", base_url=url, kwargs={"credentials": str(file)})
        infer(engine, *map(str, range(20)))
        assert tokens == ["token-0"]
        assert {seen.headers["authorization"] for seen in server.requests} == {"Bearer token-0"}
        assert server.requests[0].path == "/v1beta1/projects/p/locations/europe-west4/endpoints/openapi/chat/completions"
        monkeypatch.setattr("engines.remote.auth.TOO_YOUNG_S", 0.0)
        server.key = "token-1"  # the first has expired before its time
        (done,) = infer(engine, "again")
        assert (done.text, done.attempts, tokens) == ("again", 2, ["token-0", "token-1"])
        monkeypatch.setattr("engines.remote.auth.RENEW_BEFORE_S", 4000.0)
        server.key = None
        infer(engine, "soon to expire")
        assert tokens[2:] == ["token-2"]


def test_bedrock_sends_every_image_and_retries_by_our_rules_only(server: ProviderServer, load: Load) -> None:
    dot = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(16)).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{dot}"}}
    server.plan["two"] = ["429"]
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "two"}, image]}]
    (done,) = load("bedrock", model="amazon.nova-lite-v1:0").infer([{"messages": messages}])
    assert (done.text, done.attempts, done.model) == ("two", 2, "amazon.nova-lite-v1:0")
    assert len(server.requests) == 2
    blocks = server.requests[0].body["messages"][0]["content"]
    assert [next(iter(block)) for block in blocks] == ["image", "text", "image"]
    assert blocks[0]["image"]["format"] == "png"  # by its bytes, whatever its label says
    server.plan["no"] = ["say=400=Input is too long for requested model."]
    (done,) = infer(load("bedrock"), "no")
    assert done.error is not None
    assert (done.error.type, done.error.status) == ("context_length", 400)


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"base_url": None}, "needs engine.base_url"), ({"model": None}, "needs engine.model"),
     ({"base_url": "ftp://x"}, "is not the URL of a server"), ({"kwargs": {"n_ctx": 1}}, "engine.kwargs.n_ctx"),
     ({"fallback": ["opnai"]}, "did you mean 'openai'"), ({"headers": {"x-a": "b\nsecret"}}, "the header 'x-a' or")],
)  # fmt: skip
def test_a_configuration_that_cannot_work_is_said(load: Load, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(**keys)


@pytest.mark.parametrize(
    ("provider", "said"),
    [({"prices": {"m": {"inputt": 1, "output": 2}}}, "engine.provider.prices: 'm' has no 'inputt' (did you mean 'input'?)"),
     ({"prices": {"m": {"input": 1, "output": 2, "above": {"tokns": 5}}}},
      "engine.provider.prices: 'm'.above has no 'tokns' (did you mean 'tokens'?)"),
     ({"prices": {"m": {"input": 1, "output": 2, "batch": {"inptu": 5}}}},
      "'m'.batch has no 'inptu' (did you mean 'input'?)"),
     ({"prices": {"m": 3}}, "engine.provider.prices: 'm' needs input and output"),
     ({"prices": [1]}, "engine.provider.prices maps models to their rates"),
     ({"formats": {"regexp": "x"}}, "there is no type of response_format 'regexp' (did you mean 'regex'?)"),
     ({"no_formats": ["json_shema"]}, "there is no type of response_format 'json_shema' (did you mean 'json_schema'?)"),
     ({"models": [{"match": "a", "no_formats": ["jsn_schema"]}]}, "engine.provider.models.no_formats: there is no type of"),
     ({"models": [{"match": "["}]}, "engine.provider.models: match=[ is not a regular expression"),
     ({"defaults": {"max_tokens": "many"}}, "engine.provider.defaults.max_tokens must be a whole number"),
     ({"auth": "bearr"}, "engine.provider.auth=bearr is not known (did you mean 'bearer'?)")],
)  # fmt: skip
def test_a_wrong_name_inside_a_mapping_of_the_provider_is_said(load: Load, provider: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(provider={"wire": "chat", "auth": "optional", **provider})


def test_whole_numbers_of_any_size_and_extra_fields_are_sent(server: ProviderServer, load: Load) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"const": 2**70}}}
    engine = load(extra_body={"service_tier": "flex", "nested": {"a": 1}}, headers={"x-team": "blue"})
    asyncio.run(engine.generate(Request([{"role": "user", "content": "x"}], GenerationParams(tools=[tool]))))
    body = server.requests[0].body
    assert body["tools"][0]["function"]["parameters"]["const"] == 2**70
    assert (body["service_tier"], body["nested"]) == ("flex", {"a": 1})
    assert server.requests[0].headers["x-team"] == "blue"
