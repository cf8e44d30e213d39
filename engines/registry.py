"""Engine kinds and their classes. Only this module knows every engine."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from engines.base import Engine
from engines.config import EngineConfig, config_from_keys
from engines.errors import ConfigError, nearest

# kind -> (module:Class, the module that must be importable, the extra that installs it)
REGISTRY: dict[str, tuple[str, str | None, str]] = {
    "echo": ("engines.echo:EchoEngine", None, ""),
    "llamacpp": ("engines.local.llamacpp:LlamaCppEngine", "llama_cpp", "llamacpp"),
    "transformers": ("engines.local.transformers:TransformersEngine", "transformers", "transformers"),
    "vllm": ("engines.local.vllm:VLLMEngine", "vllm", "vllm"),
    "sglang_offline": ("engines.local.sglang:SGLangOfflineEngine", "sglang", "sglang"),
    "bedrock": ("engines.remote.bedrock:BedrockEngine", "boto3", "bedrock"),
}

# The engines behind HTTP: the name of each one's class. What they are is in conf/engine/<kind>.yaml.
HTTP_ENGINES = {
    "openai": "OpenAIEngine",
    "anthropic": "AnthropicEngine",
    "gemini": "GeminiEngine",
    "vertex": "VertexEngine",
    "together": "TogetherEngine",
    "lambda": "LambdaEngine",
    "deepseek": "DeepSeekEngine",
    "fireworks": "FireworksEngine",
    "openrouter": "OpenRouterEngine",
    "sambanova": "SambaNovaEngine",
    "parasail": "ParasailEngine",
    "remote_vllm": "RemoteVLLMEngine",
    "sglang": "SGLangEngine",
    "cerebras": "CerebrasEngine",
    "huggingface": "HuggingFaceEngine",
    "openai_compatible": "OpenAICompatibleEngine",
}
_HTTP_ENGINE = ("engines.remote.engine:RemoteEngine", None, "")
REGISTRY |= dict.fromkeys(HTTP_ENGINES, _HTTP_ENGINE)


def engine_class(kind: str, provider: Mapping[str, Any] | None = None) -> type[Engine]:
    """The class of an engine, imported now. Raises `ConfigError` for an unknown kind or a missing package.

    Any kind with a `provider` section is a remote engine: that is all it takes to add one.
    """
    if missing := missing_package(kind, provider):
        raise missing
    target, _, _ = REGISTRY.get(kind, _HTTP_ENGINE)
    module, name = target.split(":")
    loaded = getattr(importlib.import_module(module), name)
    assert issubclass(loaded, Engine)
    if kind in HTTP_ENGINES:
        return type(HTTP_ENGINES[kind], (loaded,), {"kind": kind})
    return loaded


def missing_package(kind: str, provider: Mapping[str, Any] | None = None) -> ConfigError | None:
    """What to install for an engine, or that there is none of this name; None where it can be imported."""
    if kind not in REGISTRY and not provider:
        return ConfigError(f"there is no engine '{kind}'{nearest(kind, REGISTRY)}")
    _, needs, extra = REGISTRY.get(kind, _HTTP_ENGINE)
    if needs and importlib.util.find_spec(needs) is None:
        return ConfigError(f"engine={kind} needs the package '{needs}': run pip install 'eagleray[{extra}]'")
    return None


def load_engine(kind: str | EngineConfig, **keys: Any) -> Engine:
    """An engine, loaded and ready: `load_engine("llamacpp", model=…, kwargs={…})`. Raises `ConfigError`."""
    config = kind if isinstance(kind, EngineConfig) else config_from_keys(kind, keys)
    if not config.fallback:
        return engine_class(config.kind, config.provider)(config)
    from engines.fallback import FallbackEngine

    engines: list[Engine] = []
    try:
        for each in (dataclasses.replace(config, fallback=[]), *fallbacks(config)):
            engines.append(load_engine(each))
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return FallbackEngine(config, engines)


def secret_variables(config: EngineConfig) -> set[str]:
    """The environment variables a remote engine and its fallbacks may need."""
    names = {config.api_key_env or "", *(config.provider.get("environment") or {}).values()}
    names.update(_CLOUD_VARIABLES.get(str(config.provider.get("auth")), ()))
    for entry in fallbacks(config):
        names |= secret_variables(entry)
    return names - {""}


_CLOUD_VARIABLES = {
    "aws": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
    "google": ("GOOGLE_APPLICATION_CREDENTIALS",),
}


def fallbacks(config: EngineConfig) -> list[EngineConfig]:
    """The engines of `engine.fallback`. Raises `ConfigError`."""
    found = []
    for entry in config.fallback if isinstance(config.fallback, list) else [config.fallback]:
        kind, keys = (entry, {}) if isinstance(entry, str) else (None, {})
        if isinstance(entry, Mapping):
            kind, keys = entry.get("engine"), {name: value for name, value in entry.items() if name != "engine"}
        if not isinstance(kind, str):
            raise ConfigError(
                f"engine.fallback takes names of engines, or mappings with 'engine' and its keys, not {entry!r}"
            )
        if kind not in REGISTRY and not keys.get("provider"):
            raise ConfigError(f"engine.fallback: there is no engine '{kind}'{nearest(kind, REGISTRY)}")
        found.append(config_from_keys(kind, keys))
    return found
