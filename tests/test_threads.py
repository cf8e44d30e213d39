"""One remote engine in several threads at once, each with an event loop of its own: limits are shared, nobody hangs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from engines import Completion, load_engine
from engines.base import Engine
from engines.fallback import FallbackEngine
from engines.remote.concurrency import AdaptiveSemaphore
from engines.remote.event_loops import PerLoop
from tests.support.infer import ask
from tests.support.provider_server import ProviderServer

THREADS = 8


@pytest.fixture
def server() -> Iterator[ProviderServer]:
    with ProviderServer() as running:
        yield running


def in_threads(work: Callable[[int], list[Completion]], threads: int = THREADS) -> list[list[Completion]]:
    """Starts all threads at the same moment."""
    together = threading.Barrier(threads)

    def one(number: int) -> list[Completion]:
        together.wait(30)
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return [future.result(timeout=60) for future in [pool.submit(one, number) for number in range(threads)]]


def load(server: ProviderServer, **keys: object) -> Engine:
    return load_engine("openai_compatible", **{"model": "m", "base_url": server.url, "timeout_s": 20.0, **keys})


@pytest.mark.parametrize("most", [4, 64])
def test_all_conversations_of_all_threads_are_answered_within_the_engines_limit(server: ProviderServer, most: int) -> None:
    server.latency_s = 0.01
    with load(server, max_concurrency=most) as engine:
        for again in ("first", "second"):  # with new loops in new threads
            texts = [[f"{again} {number} {i}" for i in range(20)] for number in range(THREADS)]
            done = in_threads(lambda number, texts=texts: engine.infer(map(ask, texts[number])))
            assert [[completion.text for completion in part] for part in done] == texts
        assert 1 < server.most_busy <= most


def test_failures_and_retries_in_one_thread_do_not_stop_the_others(server: ProviderServer) -> None:
    server.fault = lambda text, attempt: "503" if attempt == 1 and text.endswith(("3", "7")) else None
    with load(server, max_concurrency=8) as engine:
        done = in_threads(lambda number: engine.infer(ask(f"{number} {i}") for i in range(20)))
        assert all(completion.error is None for part in done for completion in part)
        assert engine.remote is not None
        assert engine.remote.counts["retried"] == 4 * THREADS


def test_the_limit_a_minute_holds_for_all_threads_together(server: ProviderServer) -> None:
    with load(server, requests_per_minute=600) as engine:  # one each 0.1 s, and half a second of slack
        began = time.monotonic()
        done = in_threads(lambda number: engine.infer(ask(f"{number} {i}") for i in range(5)))
        assert all(completion.error is None for part in done for completion in part)
        assert time.monotonic() - began > 0.1 * (5 * THREADS - 1) - 0.6


def test_drain_ends_what_waits_in_every_thread(server: ProviderServer) -> None:
    with load(server, requests_per_minute=60) as engine:

        def drain() -> None:
            while not server.times:
                time.sleep(0.01)
            time.sleep(0.2)
            assert engine.remote is not None
            engine.remote.drain()

        ending = threading.Thread(target=drain)
        ending.start()
        done = [completion for part in in_threads(lambda _: engine.infer(map(ask, "abcde")), 4) for completion in part]
        ending.join()
        assert len(server.times) < 20
        assert {completion.error.type for completion in done if completion.error} == {"cancelled"}
        assert sum(completion.error is None for completion in done) == len(server.times)


def test_a_slot_that_is_granted_to_a_cancelled_task_goes_to_the_next() -> None:
    async def go() -> int:
        slots = AdaptiveSemaphore(1)
        await slots.take()
        first, second = asyncio.create_task(slots.take()), asyncio.create_task(slots.take())
        await asyncio.sleep(0)
        slots.release()  # granted to the first, which is cancelled before it runs
        first.cancel()
        await asyncio.wait_for(second, 5)
        return slots.used

    assert asyncio.run(go()) == 1


def test_the_state_of_closed_loops_is_dropped() -> None:
    events = PerLoop(asyncio.Event)

    async def wait() -> None:
        event = events.get()
        assert events.get() is event
        asyncio.get_running_loop().call_soon(event.set)
        await event.wait()  # from here on the event holds its loop

    for _ in range(5):
        asyncio.run(wait())
    assert len(events.values) == 1


def test_a_fallback_hands_controls_to_its_remote_engines_only(server: ProviderServer) -> None:
    asked = []

    async def check(request: object, cost: float | None) -> bool:
        asked.append(request)
        return True

    first, second, local = load(server), load(server), load_engine("echo")
    with FallbackEngine([first, second, local]) as engine:
        assert engine.remote is not None
        engine.remote.set_budget(check)
        server.fault = lambda text, attempt: "truncated" if attempt <= 2 else "400"
        (done,) = engine.infer([ask("a")])
        assert (done.text, done.engine) == ("a", "echo")
        assert len(asked) == 2  # each of the two truncated answers may have to be paid
        server.fault = lambda text, attempt: "400" if attempt <= 1 else "truncated" if attempt == 2 else None
        (done,) = engine.infer([ask("b")])
        assert (done.text, done.engine, len(asked)) == ("b", "openai_compatible", 3)  # the second engine's own try
        assert engine.remote.outage is None
    assert FallbackEngine([load_engine("echo"), load_engine("echo")]).remote is None
