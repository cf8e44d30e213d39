"""Servers on loopback that the benches start: each is a process of its own that prints its address first."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def served(command: Sequence[str]) -> Iterator[str]:
    """The last word of the first line that the server prints. The server is killed at the end."""
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield server.stdout.readline().split()[-1]
    finally:
        server.kill()
        server.wait()


def answer_posts(path: str, handler: Callable[[Any], Awaitable[Any]]) -> None:
    """Prints its URL and answers each POST to `path` by an aiohttp handler until it is killed."""
    from aiohttp import web

    async def serve() -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post(path, handler)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())
