"""`python -m engines.trial FD`: one measurement of `eagleray tune`, in a process of its own.

It reads a `Trial` from its standard input, loads the engine, asks the warm-up, and writes a line of JSON to the file
descriptor: `{"load_s": …}`. A line on its standard input begins the measurement. The second line of JSON is its result, or
`{"error": …}`. When its standard input closes, it ends with all its processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from engines.base import Engine
from engines.config import EngineConfig
from engines.errors import EaglerayError
from engines.registry import load_engine
from engines.tasks import is_chat
from engines.text import one_line
from engines.types import Completion, Request

WARM_UP_TOKENS = 8  # of each answer


@dataclass(frozen=True, slots=True)
class Trial:
    """An engine, and the rows that it answers."""

    engine: EngineConfig
    requests: list[Request]
    warm_up: list[Request] = field(default_factory=list)
    limit_s: float = 3600.0  # the measurement stops after this time


def main(report: int) -> None:
    trial: Trial = pickle.load(sys.stdin.buffer)
    with os.fdopen(report, "w") as pipe:

        def tell(result: dict[str, Any]) -> None:
            print(json.dumps(result), file=pipe, flush=True)

        try:
            began = time.perf_counter()
            engine = load_engine(trial.engine)
            result = asyncio.run(_measured(engine, trial, lambda: tell({"load_s": time.perf_counter() - began})))
        except EaglerayError as error:
            result = {"error": str(error)}
        except Exception as error:  # of the engine's library: for example, the GPU's memory is full
            result = {"error": f"{type(error).__name__}: {one_line(error)}"}
        tell(result)
    sys.stdin.buffer.read()  # the owner ends this process: an engine with many processes needs seconds to close


async def _measured(engine: Engine, trial: Trial, ready: Callable[[], None]) -> dict[str, Any]:
    warm_up = await asyncio.gather(*(engine.generate(_short(request)) for request in trial.warm_up))
    ready()
    await asyncio.to_thread(sys.stdin.buffer.readline)
    threading.Thread(target=_end_with_owner, daemon=True).start()
    done: list[Completion] = []
    waiting = iter(trial.requests)

    async def slot() -> None:
        for request in waiting:
            done.append(await engine.generate(request))

    began = time.perf_counter()
    task = trial.requests[0].task
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(trial.limit_s):
            await asyncio.gather(*(slot() for _ in range(min(len(trial.requests), engine.concurrency_for(task)))))
    seconds = time.perf_counter() - began
    failed = [completion.error for completion in done if completion.error is not None]
    costs = [completion.cost_usd for completion in (*warm_up, *done)]
    return {
        "seconds": seconds,
        "rows": len(done),
        "failed": len(failed),
        "failure": f"{failed[0].type}: {failed[0].message}"[:300] if failed else None,
        "input": sum(completion.usage.input for completion in done),
        "output": sum(completion.usage.output for completion in done),
        "cost_usd": None if None in costs else sum(cost or 0.0 for cost in costs),
    }


def _short(request: Request) -> Request:
    if not is_chat(request.task):
        return request
    limit = min(request.generation.max_tokens or WARM_UP_TOKENS, WARM_UP_TOKENS)
    return replace(request, turns=[], generation=replace(request.generation, max_tokens=limit, n=None))


def _end_with_owner() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
