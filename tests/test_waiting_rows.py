"""Rows that wait in a worker use all the room that the engine has, and failed rows leave no memory behind."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import weakref
from pathlib import Path
from typing import Any

import pytest

from engines.base import Engine
from engines.config import config_from_keys
from engines.fallback import FallbackEngine
from engines.params import GenerationParams
from engines.registry import load_engine
from pipeline.executors.live.recorder import LeasedRow
from pipeline.executors.live.refusals import RefusalGate
from pipeline.executors.live.worker import Worker, WorkerConfig
from tests.support.infer import ask
from tests.support.provider_server import ProviderServer


def load(server: ProviderServer, **keys: Any) -> Engine:
    return load_engine(config_from_keys("openai_compatible", {"model": "m", "base_url": server.url, **keys}))


def work(engine: Engine, rows: int, tmp_path: Path) -> Worker:
    """Answers rows by the slots of a worker, as `Worker.run` does, without Ray."""

    async def go() -> Worker:
        worker = Worker(WorkerConfig(engine.config, GenerationParams(), str(tmp_path), 1.0, 1.0, 1.0, 0), "w1", None)
        worker.gate = RefusalGate(worker.recorder, engine, False)
        remote = engine.remote
        assert remote is not None
        worker.waiting.room = lambda: remote.room
        remote.notify_of_room(worker.waiting.note_room)
        slots = [asyncio.create_task(worker._slot(engine, at)) for at in range(engine.concurrency)]
        leased = [LeasedRow(1, at, 0, b"%032d" % at, f"r{at}", json.dumps(ask(f"{at}")).encode()) for at in range(rows)]
        await worker.waiting.add(leased)
        while worker.recorder.done < rows:
            await asyncio.sleep(0.01)
        await worker.waiting.end()
        await asyncio.gather(*slots)
        return worker

    with engine:
        return asyncio.run(go())


def test_all_slots_are_used_again_after_bursts_of_429(server: ProviderServer, tmp_path: Path) -> None:
    """Each second request of two bursts is refused. The limit falls to a half or less, and grows back to 64."""
    server.latency_s, numbers = 0.1, itertools.count()
    limits: list[float | None] = []

    def fault(text: str, attempt: int) -> str | None:
        at = next(numbers)
        if at == 230:
            assert engine.remote is not None
            limits.append(engine.remote.admitted)
            server.most_busy = 0
        return "429" if at % 2 and (at < 64 or 200 <= at < 220) else None

    server.fault = fault
    engine = load(server, max_concurrency=64)
    worker = work(engine, 4000, tmp_path)
    assert worker.recorder.done == 4000 and not worker.waiting.busy
    assert limits[0] is not None and limits[0] <= 32 and server.faults["429"] > 20
    assert server.most_busy == 64


def test_rows_that_a_fallback_takes_over_make_room_for_others(server: ProviderServer, tmp_path: Path) -> None:
    server.fault = lambda text, attempt: "content_filter"
    with ProviderServer(latency_s=10.0) as second:
        engine = FallbackEngine([load(server, max_concurrency=4), load(second)])
        worker = work(engine, 8, tmp_path)
    assert [record.completion.place for record in worker.recorder.records] == [1] * 8
    assert second.most_busy == 8


class Text(str):
    """A text of which it is known if something still holds it."""


@pytest.mark.parametrize("fault", ["400", "500", "not-json", "reset", "bad-gzip"])
def test_a_failed_row_leaves_no_cycle_that_holds_its_texts(server: ProviderServer, fault: str) -> None:
    server.fault = lambda text, attempt: fault
    with load(server, max_retries=1) as engine:
        text = Text("a text")
        held = weakref.ref(text)
        gc.collect()
        gc.disable()
        try:
            [done] = engine.infer([ask(text)])
            assert done.error is not None
            del text, done
            assert held() is None
        finally:
            gc.enable()
