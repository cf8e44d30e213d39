"""Builds the batch client of an engine."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from engines.config import EngineConfig, packaged
from engines.errors import ConfigError, EngineError, ErrorCode, invalid
from engines.remote.batch.anthropic import AnthropicBatches
from engines.remote.batch.client import BatchEngine, BatchWire, Client
from engines.remote.batch.fireworks import FireworksBatches
from engines.remote.batch.gemini import GeminiBatches
from engines.remote.batch.openai import OpenAIBatches
from engines.remote.batch.together import TogetherBatches
from engines.remote.provider import WIRE_PATHS
from engines.remote.task_formats import FORMATS
from engines.tasks import CHAT, is_chat, no_task
from engines.types import BYTES_PER_TOKEN

# The time in which one request is retried. A caller that waits for a batch retries later as well.
PATIENCE_S = 30.0

# Their names are also in `BATCH_WIRES` (`engines/remote/provider.py`).
BATCH_APIS: dict[str, type[BatchWire]] = {
    "openai": OpenAIBatches,
    "anthropic": AnthropicBatches,
    "together": TogetherBatches,
    "fireworks": FireworksBatches,
    "google": GeminiBatches,
}


def wire_of(engine: Any, task: str | None = None) -> tuple[BatchEngine, BatchWire]:
    """The engine's batch API; `task` is that of new batches, None if none is made.

    Raises a `ConfigError` that names the engines with a batch API if this one has none, or none for the task.
    """
    provider = getattr(engine, "provider", None)  # only remote engines have one
    if provider is None or not provider.batch:
        raise no_batch_api(engine.config.kind)
    path = WIRE_PATHS[engine.provider.wire]
    url = urlsplit(engine.endpoints.urls[0])
    base = url._replace(path=url.path.removesuffix(path), query="").geturl()
    wire = BATCH_APIS[engine.provider.batch["wire"]]
    if wire is FireworksBatches:  # jobs are under the account, not beside the chat API
        account = os.environ.get("FIREWORKS_ACCOUNT_ID")
        if not account:
            raise ConfigError(
                "batches of engine=fireworks need the environment variable FIREWORKS_ACCOUNT_ID", key="engine=fireworks"
            )
        parts = urlsplit(base)
        base = f"{parts.scheme}://{parts.netloc}/v1/accounts/{account}"
    headers = {name: value for name, value in engine.headers.items() if name.lower() != "content-type"}
    headers |= engine.auth.fixed
    if wire is GeminiBatches:  # its own API, beside the one for OpenAI's clients
        base = base.removesuffix("/openai")
        if (given := headers.pop("authorization", "")).startswith("Bearer "):
            headers["x-goog-api-key"] = given.removeprefix("Bearer ")
    client = Client(base, headers, engine.auth.clean, PATIENCE_S, url.query)
    if task is not None:
        try:
            check_batch_task(engine.config, task)
        except EngineError as error:
            raise ConfigError(str(error), key=error.key) from None
        if not is_chat(task):
            path = f"/{FORMATS[task, False].path}"
    return engine, wire(client, path, engine.provider.idempotency_header)


def batch_limits(own: Mapping[str, Any], *, queue: bool = False) -> tuple[int, int]:
    """The most rows and bytes in one batch: the provider's limits, or smaller ones in `own`, the provider's `batch` keys.

    `queue`: a batch must also fit into the provider's queue (`queued_tokens`).
    """
    api = BATCH_APIS[own["wire"]]
    rows, size = min(own.get("rows") or api.max_rows, api.max_rows), min(own.get("bytes") or api.max_bytes, api.max_bytes)
    if queue and own.get("queued_tokens"):
        size = min(size, int(own["queued_tokens"] * BYTES_PER_TOKEN))
    return rows, size


def check_batch_task(config: EngineConfig, task: str) -> None:
    """Raises `EngineError("invalid_input")` if the batch API of an engine does not have a task.

    `batch.tasks` of the provider has its tasks beside chat; `batch.chat: false` says that it has no chat.
    """
    batch = config.provider["batch"]
    tasks = {*(batch.get("tasks") or ()), *((CHAT,) if batch.get("chat", True) else ())}
    if task not in tasks:
        raise invalid(f"the batch API of {no_task(task, tasks, config.kind)}; run.mode=live sends requests", key="run.mode")


def no_batch_api(kind: str) -> ConfigError:
    """The error for an engine without a batch API; it names those that have one."""
    names = [file.name for file in (importlib.resources.files("conf") / "engine").iterdir()]
    kinds = sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))
    able = ", ".join(kind for kind in kinds if packaged(kind).get("provider", {}).get("batch"))
    text = f"engine={kind} has no batch API; these have one: {able}"
    return ConfigError(text, code=ErrorCode.NO_BATCH_API)


def encoded(wire: BatchWire, custom_id: str, body: dict[str, Any], engine: BatchEngine) -> bytes:
    """One line of the request file, with its line end."""
    content, _ = engine.encode(wire.line(custom_id, body))
    return bytes(content) + b"\n"
