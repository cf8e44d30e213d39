"""`engine=sglang_offline`: SGLang inside the worker, as its own server, which is asked over loopback.

SGLang's own chat layer (templates, tools, reasoning, structured output) exists behind HTTP only, and its in-process
`Engine` keeps changing; its command line does not. `engine.kwargs` are the flags of `python -m sglang.launch_server`, with
underscores (`tensor_parallel_size`, `mem_fraction_static`, `tool_call_parser`, …); the server goes when the worker goes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from engines.config import SourceOf, packaged
from engines.errors import ConfigError, EngineError
from engines.remote.engine import RemoteEngine
from engines.text import one_line
from engines.types import DEFAULT_MAX_TOKENS, Completion, Request

_ADAPTER = "adapter"  # the server's name for `engine.adapter`
_LOOK_S = 0.5  # how often to look whether the server is there
_MINE = ("model_path", "host", "port", "revision")  # flags that are set here


class SGLangOfflineEngine(RemoteEngine):
    """One model on as many GPUs as its parallel sizes say."""

    kind = "sglang_offline"
    dead: str | None = None  # what the server died of

    def _load(self) -> None:
        config = self.config
        if config.model is None:
            raise ConfigError("engine=sglang_offline needs engine.model: a checkpoint directory or a hub id")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.asked: set[asyncio.Task[Completion]] = set()
        self.log = tempfile.NamedTemporaryFile(prefix="eagleray-sglang-", suffix=".log")  # noqa: SIM115  # until close
        command = ["-m", "engines.local.process_guard", sys.executable, "-m", "sglang.launch_server", *self._flags(port)]
        self.server = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=self.log, stderr=self.log, start_new_session=True
        )
        try:
            self._wait(f"http://127.0.0.1:{port}/health")
            # From here on a server like any other, but that it belongs to us.
            usual = packaged("sglang")
            # As with the other local engines: greedy, and bounded, unless told otherwise.
            defaults = {"temperature": 0.0, "max_tokens": DEFAULT_MAX_TOKENS}
            self.config = dataclasses.replace(
                config,
                base_url=f"http://127.0.0.1:{port}/v1",
                provider={**usual["provider"], "defaults": defaults},
                kwargs={},
                max_concurrency=config.max_concurrency or usual["max_concurrency"],
            )
            super()._load()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, name="sglang", daemon=True).start()

    def _flags(self, port: int) -> list[str]:
        config = self.config
        flags: dict[str, Any] = {"model_path": config.model, "host": "127.0.0.1", "port": port, "revision": config.revision}
        if config.adapter is not None:
            flags |= {"enable_lora": True, "lora_paths": [f"{_ADAPTER}={config.adapter}"]}
        found: list[str] = []
        for name, value in {**flags, **config.kwargs}.items():
            if name in _MINE and name in config.kwargs:
                raise ConfigError(f"engine.kwargs.{name} is set by engine=sglang_offline itself")
            if value is None or value is False:
                continue
            values = value if isinstance(value, list) else [] if value is True else [value]
            words = (json.dumps(each) if isinstance(each, dict) else str(each) for each in values)
            found += [f"--{name.replace('_', '-')}", *words]
        return found

    def _wait(self, health: str) -> None:
        """Until the server answers. Raises `ConfigError` where it does not like its flags, `EngineError` where it dies."""
        with httpx.Client(timeout=10, trust_env=False) as client:
            while True:
                status = self.server.poll()
                if status is not None:
                    text = f"engine=sglang_offline cannot start: {self._reason()}"
                    raise ConfigError(text) if status == 2 else EngineError("engine_crash", text)
                try:
                    if client.get(health).status_code == 200:
                        return
                except httpx.HTTPError:
                    pass  # loading
                time.sleep(_LOOK_S)

    def _reason(self) -> str:
        lines = Path(self.log.name).read_text(errors="replace").splitlines() or ["it said nothing"]
        errors = [line for line in lines if re.search(r"(Error|Exception|error): ", line)]
        return one_line(Exception((errors or lines)[-1]))

    def _watch(self) -> None:
        self.server.wait()
        if self.dead is None:
            self.dead = self._reason()
        for task in list(self.asked):
            task.get_loop().call_soon_threadsafe(task.cancel)

    def attach(self, source_of: SourceOf, max_outage_s: float) -> None:
        """Its limits and outages are its own: when the server is gone, so is this engine."""

    async def _generate(self, request: Request) -> Completion:
        adapter = request.adapter or self.config.adapter
        if adapter is not None:  # others are in `kwargs.lora_paths`, by their names there
            request = dataclasses.replace(request, adapter=_ADAPTER if adapter == self.config.adapter else adapter)
        task = asyncio.create_task(super()._generate(request))
        self.asked.add(task)
        try:
            if self.dead is None:
                completion = await task
                completion.model = self.config.model
                return completion
        except asyncio.CancelledError:
            if self.dead is None:
                raise
        finally:
            self.asked.discard(task)
            task.cancel()
        raise EngineError("engine_crash", f"SGLang died: {self.dead}")

    def close(self) -> None:
        self.dead = self.dead or "the engine is closed"
        if self.server.stdin is not None:
            self.server.stdin.close()
        self.server.wait()
        super().close()
        self.log.close()
