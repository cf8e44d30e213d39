"""Builds the batch client of an engine."""

from __future__ import annotations

import importlib.resources
import os
from typing import Any
from urllib.parse import urlsplit

from engines.config import packaged
from engines.errors import ConfigError, ErrorCode
from engines.remote.batch.anthropic import AnthropicBatches
from engines.remote.batch.client import BatchEngine, BatchWire, Client
from engines.remote.batch.fireworks import FireworksBatches
from engines.remote.batch.openai import OpenAIBatches
from engines.remote.batch.together import TogetherBatches
from engines.remote.provider import WIRE_PATHS

# How long one request is retried. A caller that waits for a batch retries later as well.
PATIENCE_S = 30.0

# Their names are also in `BATCH_WIRES` (`engines/remote/provider.py`).
BATCH_APIS: dict[str, type[BatchWire]] = {
    "openai": OpenAIBatches,
    "anthropic": AnthropicBatches,
    "together": TogetherBatches,
    "fireworks": FireworksBatches,
}


def wire_of(engine: Any) -> tuple[BatchEngine, BatchWire]:
    """The engine's batch API. Raises `ConfigError`, which names the engines that have one, where it has none."""
    provider = getattr(engine, "provider", None)  # only remote engines have one
    if provider is None or not provider.batch:
        raise no_batch_api(engine.config.kind)
    path = WIRE_PATHS[engine.provider.wire]
    base = engine.endpoints.urls[0].removesuffix(path)
    wire = BATCH_APIS[engine.provider.batch["wire"]]
    if wire is FireworksBatches:  # jobs are under the account, not beside the chat API
        account = os.environ.get("FIREWORKS_ACCOUNT_ID")
        if not account:
            raise ConfigError("batches of engine=fireworks need the environment variable FIREWORKS_ACCOUNT_ID")
        parts = urlsplit(base)
        base = f"{parts.scheme}://{parts.netloc}/v1/accounts/{account}"
    headers = {name: value for name, value in engine.headers.items() if name.lower() != "content-type"}
    client = Client(base, {**headers, **engine.auth.fixed}, engine.auth.clean, PATIENCE_S)
    return engine, wire(client, path, engine.provider.idempotency_header)


def batch_limits(engine: BatchEngine, wire: BatchWire) -> tuple[int, int]:
    """The most rows and bytes in one batch: the provider's limits, or smaller ones in `engine.provider.batch`."""
    own = engine.provider.batch
    return min(own.get("rows") or wire.max_rows, wire.max_rows), min(own.get("bytes") or wire.max_bytes, wire.max_bytes)


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
