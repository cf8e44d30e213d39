"""The remote engine against servers on loopback: `python -m bench --only remote`. A C compiler builds bench/server.c.

- engine alone, 64 in flight, no latency: against a bare aiohttp loop that sends the same bodies, taking turns;
- engine alone, 512 in flight, 200 ms of latency: against the possible 2,560 requests a second;
- the whole command: rows read and results committed, one worker;
- `requests_per_minute`: the most that were sent within any 60 s, and the share of the limit that was used, with 1 and
  with 4 workers;
- the limiter's actor: leases a second, for 4 workers that ask in portions;
- faults: 2% of all requests go wrong in every way that the tests' server knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq

from bench.pipeline import asking_s, infer, write_rows
from engines import load_engine
from engines.base import Engine
from engines.params import GenerationParams
from engines.types import Request

# Oumi 0.9's whole engine on the same kind of machine, see the README's comparison.
OUMI = 3511
MESSAGES = [{"role": "user", "content": "How many of the 97 boxes hold 13 apples each, and why? Answer briefly, please."}]


@contextlib.contextmanager
def static_server(latency_ms: int = 0) -> Iterator[str]:
    """The base URL of a static C server that is up as long as the context."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/server"
        subprocess.run(["cc", "-O2", "-o", program, str(Path(__file__).with_name("server.c"))], check=True)
        process = subprocess.Popen([program, "0", str(latency_ms)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()
            process.wait()


def counted(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


async def rate(ask: Callable[[], Awaitable[None]], in_flight: int, requests: int) -> float:
    """Requests a second, after a warm-up of one for each slot."""
    for count in (in_flight, requests):
        todo = iter(range(count))
        started = time.perf_counter()

        async def slot(todo: Iterator[int] = todo) -> None:
            for _ in todo:
                await ask()

        await asyncio.gather(*(slot() for _ in range(in_flight)))
    return requests / (time.perf_counter() - started)


async def engine_alone(url: str, in_flight: int, requests: int, repeats: int) -> dict[str, float]:
    """Median requests a second of a bare aiohttp loop and of our engine, taking turns."""
    import aiohttp

    body = {"model": "static", "messages": MESSAGES}
    headers = {"content-type": "application/json", "authorization": "Bearer x"}
    bare: list[float] = []
    ours: list[float] = []
    for _ in range(repeats):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def ask_bare(session: aiohttp.ClientSession = session) -> None:
                async with session.post(f"{url}/v1/chat/completions", data=orjson.dumps(body), headers=headers) as answer:
                    orjson.loads(await answer.read())

            bare.append(await rate(ask_bare, in_flight, requests))
        engine: Engine = load_engine("openai_compatible", model="static", base_url=url, max_concurrency=in_flight)

        async def ask_ours(engine: Engine = engine) -> None:
            completion = await engine.generate(Request(MESSAGES, GenerationParams()))  # type: ignore[arg-type]
            assert completion.error is None

        ours.append(await rate(ask_ours, in_flight, requests))
        await asyncio.to_thread(engine.close)
    return {"bare": statistics.median(bare), "ours": statistics.median(ours)}


def whole(work: Path, rows: int) -> dict[str, Any]:
    """Rows a second of the whole command while it asks, one worker."""
    data, out = work / "rows.jsonl", work / "out-whole"
    write_rows(data, rows)
    with static_server() as url:
        infer(data, out, "engine.model=static", f"engine.base_url={url}", engine="openai_compatible")
    asking, _ = asking_s(out)
    return {"rows": rows, "rows_per_s": round(rows / asking)}


def limited(work: Path, workers: int, per_minute: int, seconds: int) -> dict[str, Any]:
    """What a limit of so many requests a minute comes to, as the server sees it."""
    rows = per_minute * seconds // 60
    data, out = work / f"limited-{workers}.jsonl", work / f"out-limited-{workers}"
    write_rows(data, rows)
    with static_server() as url:
        infer(
            data, out, "engine.model=static", f"engine.base_url={url}", f"engine.requests_per_minute={per_minute}",
            f"hardware.replicas={workers}", engine="openai_compatible",
        )  # fmt: skip
        seen = counted(url)
    return {
        "per_minute": per_minute,
        "most_in_60_s": seen["peak_60s"],
        "used": round(seen["count"] / seen["span_s"] * 60 / per_minute, 4),
        "requests": seen["count"],
    }


def leases(workers: int = 4, seconds: float = 5.0) -> dict[str, Any]:
    """Leases a second that the limiter's actor gives to so many workers with 256 rows waiting in each."""
    import ray

    from engines.config import EngineConfig
    from engines.remote.rate_limits import Limits
    from pipeline.executors.live.rate_limiter import rate_limit_actor, reserve_through_ray

    config = EngineConfig("openai_compatible", base_url="x", requests_per_minute=1e9)

    async def work() -> int:
        limits = Limits(config)
        limits.source = reserve_through_ray(config)
        until, taken = time.monotonic() + seconds, 0

        async def take() -> None:
            nonlocal taken
            while time.monotonic() < until:
                await limits.take("m", (1.0, 1.0))
                taken += 1

        await asyncio.gather(*(take() for _ in range(256)))
        return taken

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        held = rate_limit_actor(config)
        ray.get(held.__ray_ready__.remote())
        run = ray.remote(lambda: asyncio.run(work()))
        taken = ray.get([run.remote() for _ in range(workers)])
    finally:
        ray.shutdown()
    return {"workers": workers, "leases_per_s": round(sum(taken) / seconds)}


def faults(work: Path, rows: int, share: float = 0.02) -> dict[str, Any]:
    """Rows lost, rows twice and extra requests where a share of the requests goes wrong."""
    data, out = work / "faults.jsonl", work / "out-faults"
    write_rows(data, rows)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.provider_server", "--port", "0", "--fault-rate", str(share)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    try:
        url = server.stdout.readline().split()[-1]
        infer(
            data, out, "engine.model=m", f"engine.base_url={url}", "engine.timeout_s=5", engine="openai_compatible",
        )  # fmt: skip
        with urllib.request.urlopen(f"{url}/stats") as answer:
            stats = json.load(answer)
    finally:
        server.kill()
        server.wait()
    table = pq.read_table(out / "data", columns=["id", "response", "error"])
    ids = table["id"].to_pylist()
    return {
        "rows": rows,
        "lost": rows - len(set(ids)),
        "twice": len(ids) - len(set(ids)),
        "failed": len(ids) - table["error"].null_count,
        "requests": stats["requests"],
        "extra": round(stats["requests"] / rows - 1, 4),
        "faults": stats["faults"],
    }


def run(only: str = "", minutes: float = 2.5) -> dict[str, Any]:
    """All of it, or the step named `only`; about ten minutes, most of which is waiting under limits."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        steps: dict[str, Callable[[], Any]] = {
            "no_latency": lambda: _alone(0, 64, 20_000),
            "latency": lambda: _alone(200, 512, 20_000),
            "whole": lambda: whole(work, 100_000),
            "limited_1": lambda: limited(work, 1, 6000, round(60 * minutes)),
            "limited_4": lambda: limited(work, 4, 6000, round(60 * minutes)),
            "leases": leases,
            "faults": lambda: faults(work, 20_000),
        }
        for name, step in steps.items():
            if only and name != only:
                continue
            results[name] = step()
            print(name, results[name], file=sys.stderr, flush=True)
    return results


def _alone(latency_ms: int, in_flight: int, requests: int) -> dict[str, Any]:
    with static_server(latency_ms) as url:
        found = asyncio.run(engine_alone(url, in_flight, requests, repeats=3))
    out: dict[str, Any] = {"req_per_s": round(found["ours"]), "aiohttp_req_per_s": round(found["bare"])}
    out["ratio"] = round(found["ours"] / found["bare"], 3)
    if latency_ms:
        out["of_possible"] = round(found["ours"] / (in_flight / (latency_ms / 1000)), 3)
    else:
        out["against_oumi"] = round(found["ours"] / OUMI, 2)
    return out


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
