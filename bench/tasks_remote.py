"""Embeddings of a remote engine against a bare aiohttp client: `python -m bench --only tasks_remote`.

A server in a process of its own takes at most 2,048 texts a request and sends 1,536 numbers for each, as base64. Both
clients send the same texts, have the same number of requests in flight, and end with one numpy array a text. They take
turns.

- `latency`: the server needs a second for a request, which is fast for so many texts, so 8,192 texts/s are possible;
- `no_latency`: the processor time alone. The engine also counts the tokens, the cost and the tries of each text.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import statistics
import sys
import time
import zlib
from typing import Any

import numpy as np
import orjson

from bench.loopback import answer_posts, served
from bench.sampler import Sampler, cpu_us
from pipeline.garbage import collect_rarely

TEXTS, DIMENSIONS, MOST_TEXTS, IN_FLIGHT = 100_000, 1536, 2048, 4
LATENCIES_S = {"latency": 1.0, "short_latency": 0.2, "no_latency": 0.0}


def serve(latency_s: float) -> None:
    """Prints its URL and answers until it is killed."""
    from aiohttp import web

    vectors = np.random.default_rng(0).standard_normal((256, DIMENSIONS), np.float32)
    texts = [base64.b64encode(vector.tobytes()) for vector in vectors]

    async def embeddings(request: web.Request) -> web.Response:
        until = time.monotonic() + latency_s
        asked = orjson.loads(await request.read())["input"]
        if len(asked) > MOST_TEXTS:
            return web.json_response({"error": {"message": "too many texts"}}, status=400)
        items = [
            b'{"object":"embedding","index":%d,"embedding":"%b"}' % (at, texts[zlib.crc32(text.encode()) % 256])
            for at, text in enumerate(asked)
        ]
        count = sum(map(len, asked)) // 4
        usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (count, count)
        body = b'{"object":"list","model":"m","data":[%b],"usage":%b}' % (b",".join(items), usage)
        await asyncio.sleep(until - time.monotonic())
        return web.Response(body=body, content_type="application/json")

    answer_posts("/v1/embeddings", embeddings)


async def bare(url: str, texts: list[str]) -> list[np.ndarray]:
    import aiohttp

    found: list[list[np.ndarray]] = [[] for _ in range(0, len(texts), MOST_TEXTS)]
    parts = iter(enumerate(range(0, len(texts), MOST_TEXTS)))
    headers = {"content-type": "application/json", "authorization": "Bearer x"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def slot() -> None:
            for at, start in parts:
                body = {"model": "m", "input": texts[start : start + MOST_TEXTS], "encoding_format": "base64"}
                async with session.post(f"{url}/v1/embeddings", data=orjson.dumps(body), headers=headers) as answer:
                    items = orjson.loads(await answer.read())["data"]
                found[at] = [np.frombuffer(base64.b64decode(item["embedding"]), np.float32) for item in items]

        await asyncio.gather(*(slot() for _ in range(IN_FLIGHT)))
    return [vector for part in found for vector in part]


async def ours(url: str, texts: list[str]) -> list[np.ndarray]:
    from engines import load_engine
    from engines.params import GenerationParams

    options = {"texts": MOST_TEXTS, "tokens": 300_000, "base64": True}
    engine: Any = load_engine(
        "openai_compatible", model="m", base_url=url, max_concurrency=IN_FLIGHT, provider={"tasks": {"embed": options}},
        headers={"authorization": "Bearer x"}, price={"input": 0.02},
    )  # fmt: skip
    completions = await engine._infer([{"task": "embed", "inputs": {"text": text}} for text in texts], GenerationParams())
    await asyncio.to_thread(engine.close)
    assert all(completion.error is None for completion in completions)
    return [completion.values["embedding"] for completion in completions]


def run(only: str = "", texts: int = TEXTS, repeats: int = 3) -> dict[str, Any]:
    """All of it, or the latency named `only`."""
    collect_rarely()  # as in a worker; for both
    asked = [f"{i:06} " + "some words of a text that is embedded " * (1 + i % 5) for i in range(texts)]
    found: dict[str, Any] = {"texts": texts, "dimensions": DIMENSIONS}
    for name, latency_s in LATENCIES_S.items():
        if not only or name == only:
            found[name] = compare(asked, repeats, latency_s)
            print(name, json.dumps(found[name], indent=1), file=sys.stderr, flush=True)
    return found


def compare(asked: list[str], repeats: int, latency_s: float) -> dict[str, Any]:
    """Medians of both clients, which take turns, and a profile of a further turn of the engine."""
    command = f"from bench.tasks_remote import serve; serve({latency_s})"
    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    costs: dict[str, list[float]] = {"bare": [], "ours": []}
    with served([sys.executable, "-c", command]) as url:
        for _ in range(repeats):
            results = {}
            for name, client in (("bare", bare), ("ours", ours)):
                started, used = time.perf_counter(), os.times()
                results[name] = asyncio.run(client(url, asked))
                rates[name].append(len(asked) / (time.perf_counter() - started))
                costs[name].append(cpu_us(used, os.times(), len(asked)))
            assert all(map(np.array_equal, results["bare"], results["ours"]))
        with Sampler() as sampler:
            asyncio.run(ours(url, asked))
    ratios = [one / other for one, other in zip(rates["ours"], rates["bare"], strict=True)]
    return {
        "texts_per_s": round(statistics.median(rates["ours"])),
        "aiohttp_texts_per_s": round(statistics.median(rates["bare"])),
        "ratio": round(statistics.median(ratios), 3),
        "cpu_us": statistics.median(costs["ours"]),
        "aiohttp_cpu_us": statistics.median(costs["bare"]),
        "profile": sampler.top(),
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
