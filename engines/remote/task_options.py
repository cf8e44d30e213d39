"""A provider's tasks other than a chat, as data: `engine.provider.tasks`.

tasks:
  embed: {texts: 2048, tokens: 300000, dimensions: true, base64: true}
  rerank: {}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from engines.errors import ConfigError, no_such
from engines.tasks import CHAT, TASKS
from engines.validation import Refused, at_least, check_fields, check_keys, text

# The ends of the URLs of tasks: `engine.base_url` may be the full URL of one.
TASK_PATHS = ("/embeddings", "/classify", "/score", "/pooling", "/rerank", "/completions")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise Refused.value(name, "true or false", value)
    return value


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise Refused.value(name, "a list of texts", value)
    return value


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """The keys under `engine.provider.tasks.<task>`."""

    # Relative to the URL of the API, such as https://…/v1/; None: that of the task's format.
    path: str | None = field(default=None, metadata={"check": text})
    texts: int = field(default=1, metadata={"check": at_least(1)})  # the most rows in one request
    tokens: int | None = field(default=None, metadata={"check": at_least(1)})  # the most input tokens in one request
    # embed: the API has the field `dimensions`; otherwise embeddings are cut here.
    dimensions: bool = field(default=False, metadata={"check": _flag})
    base64: bool = field(default=False, metadata={"check": _flag})  # embed: the API can send numbers as base64
    # classify: the labels in the order of the model's outputs, for servers that name the best one only.
    labels: list[str] = field(default_factory=list, metadata={"check": _texts})
    conversations: bool = field(default=False, metadata={"check": _flag})  # a row may be a conversation

    @classmethod
    def of(cls, task: str, values: Mapping[str, Any] | None, where: str = "engine.provider.tasks") -> TaskOptions:
        """Raises `ConfigError` for an unknown task, key or value."""
        if task not in TASKS or task == CHAT:
            raise ConfigError(f"{where}: {no_such('task', task, set(TASKS) - {CHAT})}", key="engine.provider")
        check_keys(values or {}, [f.name for f in fields(cls)], f"{where}.{task}")
        options = cls(**(values or {}))
        check_fields(f"{where}.{task}", options)
        return options
