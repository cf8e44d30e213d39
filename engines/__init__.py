"""Eagleray's engines, usable without Ray: `from engines import load_engine, Conversation`.

Importing this loads no heavy library. An engine's own package is imported when the engine's class is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engines.base import Engine
from engines.config import Capabilities, EngineConfig, Price
from engines.errors import ConfigError, EaglerayError, EngineError, Failure
from engines.params import GenerationParams
from engines.registry import HTTP_ENGINES, REGISTRY, load_engine
from engines.types import Choice, Completion, ContentPart, Conversation, Delta, FinishReason, Message, Request, ToolCall
from engines.usage import Usage

if TYPE_CHECKING:
    from engines.echo import EchoEngine
    from engines.local.llamacpp import LlamaCppEngine
    from engines.local.sglang import SGLangOfflineEngine
    from engines.local.transformers import TransformersEngine
    from engines.local.vllm import VLLMEngine

__all__ = [
    "Capabilities",
    "Choice",
    "Completion",
    "ConfigError",
    "ContentPart",
    "Conversation",
    "Delta",
    "EaglerayError",
    "EchoEngine",
    "Engine",
    "EngineConfig",
    "EngineError",
    "Failure",
    "FinishReason",
    "GenerationParams",
    "LlamaCppEngine",
    "Message",
    "Price",
    "Request",
    "SGLangOfflineEngine",
    "ToolCall",
    "TransformersEngine",
    "Usage",
    "VLLMEngine",
    "load_engine",
    *HTTP_ENGINES.values(),
    "BedrockEngine",
]


def __getattr__(name: str) -> Any:
    from engines.registry import engine_class

    for kind, entry in REGISTRY.items():
        if name == (entry.class_name or entry.target.partition(":")[2]):
            return engine_class(kind)
    raise AttributeError(f"module 'engines' has no attribute '{name}'")
