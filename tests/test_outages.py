"""Servers that are not there, ask for long waits, or come back: what the engine does, and what people are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import engines.remote.concurrency
import engines.remote.sender
from engines import Completion, load_engine
from engines.config import EngineConfig
from engines.free_port import free_port
from engines.params import GenerationParams
from engines.remote.rate_limits import Reservation, Reserve, ReserveRequest
from engines.types import to_request
from tests.support.infer import ask
from tests.support.provider_server import ProviderServer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.remote.sender, "BACKOFF_FIRST_S", 0.005)
    monkeypatch.setattr(engines.remote.concurrency, "PROBE_FIRST_S", 0.05)
    monkeypatch.setattr(engines.remote.concurrency, "PROBE_MOST_S", 0.1)


Load = Callable[..., Any]


@pytest.fixture
def load(server: ProviderServer) -> Iterator[Load]:
    loaded: list[Any] = []

    def one(**keys: Any) -> Any:
        loaded.append(load_engine("openai_compatible", **{"model": "m", "base_url": server.url, "timeout_s": 5.0, **keys}))
        return loaded[-1]

    yield one
    for engine in loaded:
        engine.close()


async def answers(engine: Any, *texts: str) -> list[Completion | BaseException]:
    rows = [to_request(ask(text), GenerationParams()) for text in texts]
    return await asyncio.gather(*(engine.generate(row) for row in rows), return_exceptions=True)


def test_a_probe_that_raises_does_not_leave_its_endpoint_out(server: ProviderServer, load: Load) -> None:
    """A probe meets a bug, here of what reserves its share of the limits: the next probe follows all the same."""
    fails, broken = [False], [True]

    def source_of(config: EngineConfig) -> Reserve:
        async def reserve(model: str, request: ReserveRequest) -> Reservation:
            if fails[0]:
                fails[0] = False
                raise RuntimeError("the actor is lost")
            return Reservation(len(request.costs), wait_s=0.001)

        return reserve

    engine = load(max_concurrency=16)
    engine.remote.attach(source_of, 60.0)
    server.fault = lambda text, attempt: "503" if broken[0] else None

    async def go() -> list[Completion | BaseException]:
        first = asyncio.create_task(answers(engine, *(f"row {i}" for i in range(16))))
        endpoint = engine.endpoints.all[0]
        # Nothing is in flight, so the next probe alone asks for a share. It comes a second after the circuit opens.
        while not (endpoint.open and endpoint.outstanding == 0):
            await asyncio.sleep(0.001)
        fails[0], broken[0] = True, False  # for the next probe
        return await first

    done = asyncio.run(go())
    assert [str(each) for each in done if isinstance(each, BaseException)] == ["the actor is lost"]
    answered = [each for each in done if isinstance(each, Completion) and each.error is None]
    assert len(answered) == 15 and engine.remote.outage is None


def test_a_wait_of_a_day_is_bounded_and_told(server: ProviderServer, load: Load) -> None:
    server.fault = lambda text, attempt: "429-after=86400"
    engine = load(max_concurrency=4)
    engine.remote.max_outage_s = 1.5

    async def go() -> tuple[str, list[Completion | BaseException]]:
        task = asyncio.create_task(answers(engine, "a", "b"))
        while not (told := engine.remote.stall_reason) and not task.done():
            await asyncio.sleep(0.01)
        return told, await task

    began = time.monotonic()
    told, done = asyncio.run(go())
    assert time.monotonic() - began < 60
    assert "HTTP 429: slow down. The server asks for a wait of 1 day, 0:00:00" in told
    assert "the run stops after 0:00:02" in told
    assert "has not answered for" in engine.remote.outage and server.url in engine.remote.outage
    for each in done:
        assert isinstance(each, Completion) and each.error is not None
        assert (each.error.type, each.error.retryable) == ("rate_limit", True)
    assert len(server.times) <= 6  # nobody is asked before the time is over


def test_an_answer_ends_what_is_told_of_a_wait(server: ProviderServer, load: Load) -> None:
    server.plan["later"] = ["429-after=86400"]
    engine = load(max_concurrency=4)
    engine.remote.max_outage_s = 1.0

    async def go() -> list[Completion | BaseException]:
        later = asyncio.create_task(answers(engine, "later"))
        while not engine.remote.stall_reason and not later.done():
            await asyncio.sleep(0.01)
        [now] = await answers(engine, "now")
        assert isinstance(now, Completion) and now.text == "now"
        assert engine.remote.stall_reason == ""
        return await later

    engine.remote.limits.observe = lambda *_: None  # the pause of all other rows is another rule
    [done] = asyncio.run(go())
    assert isinstance(done, Completion) and done.text == "later"


@pytest.mark.parametrize("place", ["nobody listens", "no such host", "another program"])
def test_an_address_where_nothing_ever_answered_is_given_up_soon(
    place: str, server: ProviderServer, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines.remote.sender, "UNREACHED_S", 1.0)
    url = {"nobody listens": f"http://127.0.0.1:{free_port()}", "no such host": "http://api.provider.invalid"}.get(place)
    server.fault = lambda text, attempt: "not-json"
    engine = load(base_url=f"{(url or server.url).replace('//', '//me:secret@')}/v1", max_concurrency=16)
    done = asyncio.run(answers(engine, *(f"row {i}" for i in range(32))))
    assert engine.remote.max_outage_s == 900
    assert f"at {url or server.url}/v1/chat/completions" in engine.remote.outage
    assert "no server has ever answered there: check engine.base_url" in engine.remote.outage
    assert "secret" not in engine.remote.outage
    for each in done:
        assert isinstance(each, Completion) and each.error is not None and each.error.retryable


def test_a_server_that_takes_requests_and_is_slow_is_waited_for(
    server: ProviderServer, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines.remote.sender, "UNREACHED_S", 0.0)
    server.fault = lambda text, attempt: "hang" if len(server.times) <= 20 else None
    engine = load(max_concurrency=16, timeout_s=0.5)
    done = asyncio.run(answers(engine, *(f"row {i}" for i in range(16))))
    assert all(isinstance(each, Completion) and each.error is None for each in done)


def test_one_row_alone_finds_out_that_nobody_is_there(load: Load) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    [done] = asyncio.run(answers(load(base_url=url, max_retries=1), "a"))
    assert isinstance(done, Completion) and done.error is not None
    assert (done.error.type, done.error.scope, done.attempts) == ("connection", "run", 2)


def test_a_server_that_answered_once_is_waited_for_longer(
    server: ProviderServer, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines.remote.sender, "UNREACHED_S", 0.2)
    server.fault = lambda text, attempt: "503" if len(server.times) < 30 else None
    engine = load(max_concurrency=16)
    done = asyncio.run(answers(engine, *(f"row {i}" for i in range(16))))
    assert all(isinstance(each, Completion) and each.error is None for each in done)
