"""`engine=sglang_offline`: a server of SGLang that this engine starts and asks over loopback.

SGLang's chat layer (templates, tools, reasoning, structured output) exists only behind HTTP, and its in-process `Engine`
changes often; its command line is stable. `engine.kwargs` are the flags of `python -m sglang.launch_server`, with
underscores (`tensor_parallel_size`, `mem_fraction_static`, `tool_call_parser`, …). The server ends when the worker ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx

from engines.config import Capabilities, SourceOf, config_from_keys, packaged
from engines.errors import ConfigError, engine_died
from engines.free_port import free_port
from engines.local import process_guard
from engines.remote.engine import RemoteEngine
from engines.remote.provider import Provider
from engines.remote.sender import RequestSender
from engines.text import one_line
from engines.types import DEFAULT_MAX_TOKENS, Completion, Request

_ADAPTER = "adapter"  # the server's name for `engine.adapter`
_POLL_S = 0.5  # how often to ask whether the server is ready
_USAGE_ERROR = 2  # argparse's exit status for wrong flags
_RESERVED = ("model_path", "host", "port", "revision")  # flags that this engine sets


class _ServerSender(RequestSender):
    """Sends to the engine's own server, which has no rate limits, and whose end is the engine's."""

    def attach(self, source_of: SourceOf, max_outage_s: float) -> None:
        """Does nothing."""


class SGLangOfflineEngine(RemoteEngine):
    """One model on the GPUs that its parallel sizes need.

    Loading raises `ConfigError` for a wrong configuration, and `EngineError("engine_crash")` if the server dies.
    """

    kind = "sglang_offline"
    runs_here = True
    sender_class = _ServerSender
    dead: str | None = None  # why the server ended; None while it runs

    def _load(self) -> None:
        config = self.config
        if config.model is None:
            raise ConfigError(
                "engine=sglang_offline needs engine.model: a checkpoint directory or a hub id", key="engine.model"
            )
        port = free_port()
        self.asked: set[asyncio.Task[Completion]] = set()
        self.log = tempfile.NamedTemporaryFile(prefix="eagleray-sglang-", suffix=".log")  # noqa: SIM115  # until close
        command = [*process_guard.COMMAND, sys.executable, "-m", "sglang.launch_server", *self._flags(port)]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log, start_new_session=True
        )
        try:
            self._wait(f"http://127.0.0.1:{port}/health")
            # From here on, this is a remote engine with a server of its own.
            usual = packaged("sglang")
            # The defaults of all local engines: greedy, with a limit of output tokens.
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

    @classmethod
    def class_capabilities(cls, model: str | None) -> Capabilities:
        return Provider.of(config_from_keys("sglang", {})).for_model(model).capabilities()

    def _flags(self, port: int) -> list[str]:
        """The server's command line flags. Raises `ConfigError` for a flag that this engine sets."""
        config = self.config
        flags: dict[str, Any] = {"model_path": config.model, "host": "127.0.0.1", "port": port, "revision": config.revision}
        if config.adapter is not None:
            flags |= {"enable_lora": True, "lora_paths": [f"{_ADAPTER}={config.adapter}"]}
        found: list[str] = []
        for name, value in {**flags, **config.kwargs}.items():
            if name in _RESERVED and name in config.kwargs:
                raise ConfigError(
                    f"engine.kwargs.{name} is set by engine=sglang_offline itself", key="engine=sglang_offline"
                )
            if value is None or value is False:
                continue
            values = value if isinstance(value, list) else [] if value is True else [value]
            words = (json.dumps(each) if isinstance(each, dict) else str(each) for each in values)
            found += [f"--{name.replace('_', '-')}", *words]
        return found

    def _wait(self, health: str) -> None:
        """Waits until the server answers. Raises `ConfigError` if it refuses its flags, `EngineError` if it dies."""
        with httpx.Client(timeout=10, trust_env=False) as client:
            while True:
                status = self.server.poll()
                if status is not None:
                    text = f"engine=sglang_offline cannot start: {self._reason()}"
                    raise ConfigError(text) if status == _USAGE_ERROR else engine_died(text)
                try:
                    if client.get(health).status_code == 200:
                        return
                except httpx.HTTPError:
                    pass  # it is loading
                time.sleep(_POLL_S)

    def _reason(self) -> str:
        """The last error in the server's log, else its last line."""
        lines = Path(self.log.name).read_text(errors="replace").splitlines() or ["its log is empty"]
        errors = [line for line in lines if re.search(r"(Error|Exception|error): ", line)]
        return one_line(Exception((errors or lines)[-1]))

    def _watch(self) -> None:
        """Waits for the server's end, then cancels the requests in it."""
        self.server.wait()
        if self.dead is None:
            self.dead = self._reason()
        for task in list(self.asked):
            task.get_loop().call_soon_threadsafe(task.cancel)

    def inspect_image(self, data: bytes) -> None:
        from engines.local.images import open_image  # with the server's own package, Pillow is there

        open_image(data, self.config.media_max_pixels).close()

    async def _generate(self, request: Request) -> Completion:
        return await self._while_alive(super()._generate, request)

    async def _evaluate(self, request: Request) -> Completion:
        return await self._while_alive(super()._evaluate, request)

    async def _while_alive(self, ask: Callable[[Request], Coroutine[Any, Any, Completion]], request: Request) -> Completion:
        """The answer; or the error `engine_crash`, if the server dies before."""
        adapter = request.adapter or self.config.adapter
        if adapter is not None:  # other adapters are in `kwargs.lora_paths`, with their names there
            request = dataclasses.replace(request, adapter=_ADAPTER if adapter == self.config.adapter else adapter)
        task = asyncio.create_task(ask(request))
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
        raise engine_died(f"SGLang died: {self.dead}")

    def close(self) -> None:
        """Stops the server."""
        self.dead = self.dead or "the engine is closed"
        if self.server.stdin is not None:
            self.server.stdin.close()
        self.server.wait()
        super().close()
        self.log.close()
