"""Shared by all parts of the batch executor: the engine, the provider's batch API, and the batches of one output."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson
import pyarrow.fs as pafs

from engines.errors import ConfigError, ErrorCode
from engines.identity import first_url, identity
from engines.registry import load_engine
from engines.remote.batch.client import BatchStatus
from engines.remote.batch.factory import batch_limits, no_batch_api, wire_of
from engines.tasks import is_chat
from engines.types import Request
from pipeline.config import Config
from pipeline.executors.batch.store import Batch, BatchStore


class BatchSession:
    """Opened for one output directory. Raises `ConfigError` if the engine has no batch API, or if batches under way were
    made with other settings."""

    def __init__(self, config: Config, fs: pafs.FileSystem, root: str) -> None:
        self.config, self.fs, self.root = config, fs, root
        if not config.engine.provider.get("batch"):
            raise no_batch_api(config.engine.kind)
        self.engine, self.wire = wire_of(load_engine(dataclasses.replace(config.engine, fallback=[])), config.task)
        self.generation = config.params()
        plain = Request([], self.generation, task=config.task)
        self.model = str(self.engine.served_model(plain))  # of batches whose rows name no model themselves
        self.engine.check(self.generation)
        self.max_rows, self.max_bytes = batch_limits(self.engine.provider.batch, queue=True)
        self.queued_tokens: int | None = self.engine.provider.batch.get("queued_tokens")
        settings = {**identity(config.engine).values, "base_url": first_url(config.engine)}
        if not is_chat(config.task):  # batches of earlier versions have no task
            settings["task"] = config.task
        self.settings = _as_json({**settings, "generation": self.generation.given()})
        self.store = BatchStore(fs, root)
        self._check_settings()
        # A resumed run goes on with the rounds of its batches. A new run starts new rounds.
        self.resumed = bool(self.store.open)
        rounds = [batch.round for batch in self.store.batches]
        self.first_round = min((b.first for b in self.store.open), default=max(rounds, default=0) + 1)

    def _check_settings(self) -> None:
        for batch in self.store.open:
            if names := [name for name in self.settings if batch.settings.get(name) != self.settings[name]]:
                there = ", ".join(f"{name}={batch.settings.get(name)}" for name in names)
                text = f"batches under way were made with {there}: go on with that, or choose another output.path"
                raise ConfigError(text, code=ErrorCode.BATCHES_UNDER_WAY)

    @property
    def next_round(self) -> int:
        rounds = (batch.round for batch in self.store.batches if batch.round >= self.first_round)
        return max(rounds, default=self.first_round - 1) + 1

    def enter(self, batch: Batch, state: str) -> None:
        """Makes the new state of a batch durable."""
        batch.state = state
        self.store.save(batch)

    def close(self) -> None:
        self.wire.client.close()
        self.engine.close()


def _as_json(value: Any) -> Any:
    """The value as a JSON file gives it back."""
    return orjson.loads(orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS))


def done_of(rows: int, status: BatchStatus | None) -> int:
    """The number of finished rows. Some providers tell only percentages."""
    return min(rows, (status.done + status.failed) * rows // status.total) if status and status.total else 0
