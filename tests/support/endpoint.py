"""A running `eagleray serve`, in a process of its own."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.processes import PATIENCE_S, end, family, own_ray, title, until

ROOT = Path(__file__).parent.parent.parent
KEY = "sk-of-the-endpoint-0123456789"


@dataclass
class Endpoint:
    process: subprocess.Popen[str]
    url: str
    printed: str
    log: Path
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=PATIENCE_S))

    def client(self, key: str = KEY, retries: int = 0) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=retries, timeout=PATIENCE_S)

    def post(self, content: str = "Hi") -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}]}
        return self.http.post(f"{self.url}/v1/chat/completions", json=body)

    def replicas(self) -> list[psutil.Process]:
        return [process for process in family(self.process.pid) if title(process).startswith("ray::ServeReplica:")]

    def news(self) -> list[str]:
        """What it said since it serves."""
        return self.log.read_text().partition(self.printed)[2].split("\n")[1:-1]

    def until(self, true: Callable[[], Any]) -> None:
        until(true, self.process)

    def stop(self) -> None:
        processes = [*family(self.process.pid), self.process]
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE_S)
        end(processes)


def start(tmp_path: Path, *args: str, **env: str) -> Endpoint:
    """An endpoint that serves; its process has a session of its own, so that processes it leaves behind are found."""
    log = tmp_path / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.serve", "serve.port=0", *args],
            env={**own_ray(), **env}, cwd=ROOT, stdout=file, stderr=file, text=True, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + PATIENCE_S
    while not (found := re.search(r" at (http://\S+)/v1, until Ctrl-C.*\n(curl .*)\n", log.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            end([*family(process.pid), process])
            pytest.fail(f"eagleray serve did not start:\n{log.read_text()}")
        time.sleep(0.1)
    return Endpoint(process, found[1], found[2], log)
