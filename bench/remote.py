"""The remote engine against servers on loopback: `python -m bench --only remote`. A C compiler builds bench/server.c.

- engine alone, 64 in flight, no latency: against a bare aiohttp loop that sends the same bodies, taking turns, with the
  processor time of each request and a profile of the engine;
- engine alone, 512 in flight, 200 ms of latency: the same, and against the possible 2,560 requests a second;
- the whole command: rows read and results committed, one worker;
- `requests_per_minute`: the most that were sent within any 60 s, and the share of the limit that was used, with 1 and
  with 4 workers;
- the limiter's actor: leases a second, for 4 workers that ask in portions;
- faults: 2% of all requests go wrong in every way that the tests' server knows;
- refused: 256 in flight at a server that takes 8 at once and refuses the others (429), against the least possible time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq

from bench.loopback import answer_posts, served
from bench.pipeline import asking_s, infer, write_rows
from bench.sampler import Sampler, cpu_us
from engines import load_engine
from engines.base import Engine
from engines.params import GenerationParams
from engines.types import Request
from pipeline.garbage import collect_rarely

# Oumi 0.9's whole engine on the same kind of machine, see the README's comparison.
OUMI = 3511
MESSAGES = [{"role": "user", "content": "How many of the 97 boxes hold 13 apples each, and why? Answer briefly, please."}]


@contextlib.contextmanager
def static_server(latency_ms: int = 0) -> Iterator[str]:
    """The base URL of a static C server that is up as long as the context."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/server"
        subprocess.run(["cc", "-O2", "-o", program, str(Path(__file__).with_name("server.c"))], check=True)
        with served([program, "0", str(latency_ms)]) as port:
            yield f"http://127.0.0.1:{port}"


def counted(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


Ask = Callable[[], Awaitable[None]]


async def rate(ask: Ask, in_flight: int, requests: int) -> tuple[float, float]:
    """Requests a second, and microseconds of processor time for each, after a warm-up of one for each slot."""
    for count in (in_flight, requests):
        todo = iter(range(count))
        started, used = time.perf_counter(), os.times()

        async def slot(todo: Iterator[int] = todo) -> None:
            for _ in todo:
                await ask()

        await asyncio.gather(*(slot() for _ in range(in_flight)))
    return requests / (time.perf_counter() - started), cpu_us(used, os.times(), requests)


@contextlib.asynccontextmanager
async def bare_client(url: str, in_flight: int) -> AsyncIterator[Ask]:
    """A loop over aiohttp that sends the engine's bodies and parses the answers."""
    import aiohttp

    body = {"model": "static", "messages": MESSAGES}
    headers = {"content-type": "application/json", "authorization": "Bearer x"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask() -> None:
            async with session.post(f"{url}/v1/chat/completions", data=orjson.dumps(body), headers=headers) as answer:
                orjson.loads(await answer.read())

        yield ask


@contextlib.asynccontextmanager
async def engine_client(url: str, in_flight: int) -> AsyncIterator[Ask]:
    headers = {"authorization": "Bearer x"}
    engine: Engine = load_engine(
        "openai_compatible", model="static", base_url=url, max_concurrency=in_flight, headers=headers
    )

    async def ask() -> None:
        completion = await engine.generate(Request(MESSAGES, GenerationParams()))  # type: ignore[arg-type]
        assert completion.error is None

    yield ask
    await asyncio.to_thread(engine.close)


async def in_turns(url: str, in_flight: int, requests: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """What `rate` gives for the bare loop and for the engine, which take turns; with the profile of a further turn."""
    found: dict[str, list[tuple[float, float]]] = {"bare": [], "ours": []}
    for _ in range(repeats):
        for name, client in (("bare", bare_client), ("ours", engine_client)):
            async with client(url, in_flight) as ask:
                found[name].append(await rate(ask, in_flight, requests))
    return found


async def profile(url: str, in_flight: int, requests: int) -> list[str]:
    async with engine_client(url, in_flight) as ask:
        with Sampler() as sampler:
            await rate(ask, in_flight, requests)
    return sampler.top()


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
    command = [sys.executable, "-m", "tests.support.provider_server", "--port", "0", "--fault-rate", str(share)]
    with served(command) as url:
        infer(
            data, out, "engine.model=m", f"engine.base_url={url}", "engine.timeout_s=5", engine="openai_compatible",
        )  # fmt: skip
        with urllib.request.urlopen(f"{url}/stats") as answer:
            stats = json.load(answer)
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


# Requests that the server of `refused` takes at once, and the seconds that it needs for one.
AT_ONCE, NEEDS_S = 8, 0.01


def serve_few() -> None:
    """Prints its URL and answers until it is killed: at most `AT_ONCE` requests at once, 429 to the others."""
    from aiohttp import web

    busy = 0
    said = {"role": "assistant", "content": "x"}
    answer = {
        "choices": [{"message": said, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
    }

    async def chat(request: web.Request) -> web.Response:
        nonlocal busy
        await request.read()
        if busy >= AT_ONCE:
            return web.json_response({"error": {"message": "slow down", "type": "rate_limit"}}, status=429)
        busy += 1
        await asyncio.sleep(NEEDS_S)
        busy -= 1
        return web.json_response(answer)

    answer_posts("/v1/chat/completions", chat)


def refused(rows: int, in_flight: int) -> dict[str, Any]:
    command = [sys.executable, "-c", "from bench.remote import serve_few; serve_few()"]
    with (
        served(command) as url,
        load_engine("openai_compatible", model="m", base_url=url, max_concurrency=in_flight) as engine,
    ):
        started = time.perf_counter()
        done = engine.infer([{"messages": MESSAGES}] * rows)
        took = time.perf_counter() - started
    failed = sum(completion.error is not None for completion in done)
    sent = sum(completion.attempts for completion in done)
    least = rows * NEEDS_S / AT_ONCE
    return {"rows": rows, "in_flight": in_flight, "s": round(took, 1), "least_s": least, "failed": failed, "sent": sent}


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
            "refused": lambda: refused(2000, 256),
        }
        for name, step in steps.items():
            if only and name != only:
                continue
            results[name] = step()
            print(name, json.dumps(results[name], indent=1), file=sys.stderr, flush=True)
    return results


def _alone(latency_ms: int, in_flight: int, requests: int) -> dict[str, Any]:
    collect_rarely()  # as in a worker; for both
    with static_server(latency_ms) as url:
        found = asyncio.run(in_turns(url, in_flight, requests, repeats=3 if latency_ms else 5))
        top = asyncio.run(profile(url, in_flight, requests))
    ratios = [ours[0] / bare[0] for ours, bare in zip(found["ours"], found["bare"], strict=True)]
    middle = {
        name: [round(statistics.median(each), 1) for each in zip(*turns, strict=True)] for name, turns in found.items()
    }
    out: dict[str, Any] = {
        "req_per_s": round(middle["ours"][0]),
        "aiohttp_req_per_s": round(middle["bare"][0]),
        "ratio": round(statistics.median(ratios), 3),
        "cpu_us": middle["ours"][1],
        "aiohttp_cpu_us": middle["bare"][1],
        "profile": top,
    }
    if latency_ms:
        out["of_possible"] = round(middle["ours"][0] / (in_flight / (latency_ms / 1000)), 3)
    else:
        out["against_oumi"] = round(middle["ours"][0] / OUMI, 2)
    return out


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
