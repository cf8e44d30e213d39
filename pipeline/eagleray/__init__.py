"""Eagleray, by its own name: `import eagleray`. The names of `pipeline` and `engines` that a program needs.

When Eagleray is installed, this is a package of its own (`package-dir` in pyproject.toml). It imports no heavy library.
"""

from __future__ import annotations

from typing import Any

import engines
from engines import (
    Capabilities,
    Completion,
    ConfigError,
    Conversation,
    EaglerayError,
    Engine,
    EngineConfig,
    EngineError,
    Failure,
    GenerationParams,
    Message,
    Price,
    Request,
    Usage,
    load_engine,
)
from pipeline.errors import Interrupted, Stopped
from pipeline.program.infer import infer

__all__ = [
    "Capabilities",
    "Completion",
    "ConfigError",
    "Conversation",
    "EaglerayError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "Failure",
    "GenerationParams",
    "Interrupted",
    "Message",
    "Price",
    "Request",
    "Stopped",
    "Usage",
    "infer",
    "load_engine",
]


def __getattr__(name: str) -> Any:
    """The engine classes (`OpenAIEngine`, …), and the version."""
    if name == "__version__":
        from importlib.metadata import version

        return version("eagleray")
    if name in engines.__all__:
        return getattr(engines, name)
    raise AttributeError(f"module 'eagleray' has no attribute '{name}'")
