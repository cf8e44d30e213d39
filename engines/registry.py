"""All kinds of engines: the class of each, and the facts about it that need no import of its library.

No other module has a list of engines. The keys of an engine are in `conf/engine/<kind>.yaml`. A kind that is not in
`REGISTRY` but has a `provider` section is a remote engine, so a user's own provider is one YAML file.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engines.base import Engine
from engines.compatible_servers import no_such_engine
from engines.config import Capabilities, EngineConfig, config_from_keys, packaged
from engines.errors import ConfigError, EngineError, ErrorCode, Finding
from engines.tasks import TASKS, no_task
from engines.tuning import Machine, Setting
from engines.types import Request


@dataclass(frozen=True, slots=True)
class EngineKind:
    """The facts about an engine that need no import of its library."""

    target: str  # module:Class
    package: str | None = None  # what must be importable
    extra: str = ""  # the extra of our package that installs it
    class_name: str | None = None  # the class's public name, if it differs from the target's
    preflight: str | None = None  # module:function, for a class whose module imports a heavy library
    holds_model: bool = False  # one model in the worker's memory: a row cannot name another; keys cover its content
    gguf_only: bool = False  # all its models are GGUF files
    # Its models are neither GGUF files nor Hugging Face checkpoints, so their size and chat template are not known.
    own_format: bool = False
    gpu_by_layers: bool = False  # uses a GPU only for `n_gpu_layers`
    reserves_sequences: bool = False  # allocates the KV cache of all its sequences when it starts
    parallel_sizes: bool = False  # shards by `tensor_parallel_size`; takes a share of each whole GPU; Ray spreads it
    no_float32: bool = False  # loads float32 checkpoints as bfloat16 unless the user sets a type
    # If set, only these keywords do not change answers. None: only the keywords in `ANSWER_KWARGS` (engines/identity.py)
    # change answers.
    speed_kwargs: frozenset[str] | None = None
    images_by_model: bool = False  # the loaded model decides whether it takes images
    capabilities: Capabilities | None = None  # of a class whose module imports a heavy library; None: ask the class
    # module:function that tells the tasks of the configured model from its files; it returns None if they are not here
    tasks: str | None = None
    tuning: str = "engines.tuning:concurrency"  # module:function that yields the settings for `eagleray tune`


_HTTP_ENGINE = EngineKind("engines.remote.engine:RemoteEngine")
_LOCAL = "engines.local.preflight:"

# The engines behind HTTP, and the name of each one's class in `engines`. They share `RemoteEngine`: what differs between
# providers is in the `provider` section of their YAML files.
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

_TRANSFORMERS_SPEED = frozenset((
    "device_map", "max_memory", "offload_folder", "offload_buffers", "attn_implementation", "use_safetensors",
    "weights_only", "use_kernels", "use_cache", "trust_remote_code", "cache_dir", "local_files_only", "token",
    "max_batch_size", "max_model_len", "continuous_batching",
))  # fmt: skip

REGISTRY: dict[str, EngineKind] = {
    "echo": EngineKind("engines.echo:EchoEngine"),
    "llamacpp": EngineKind(
        "engines.local.llamacpp:LlamaCppEngine", "llama_cpp", "llamacpp",
        preflight=f"{_LOCAL}check_llamacpp", holds_model=True, gguf_only=True, gpu_by_layers=True, reserves_sequences=True,
        capabilities=Capabilities(prefill=True, tasks=frozenset(TASKS)),
        tasks="engines.local.gguf_tasks:gguf_tasks", tuning="engines.tuning:llamacpp",
    ),
    "transformers": EngineKind(
        "engines.local.transformers:TransformersEngine", "transformers", "transformers",
        preflight=f"{_LOCAL}check_transformers", holds_model=True, images_by_model=True, speed_kwargs=_TRANSFORMERS_SPEED,
        capabilities=Capabilities(
            response_formats=frozenset(("json_object", "json_schema", "regex", "choice")), prefill=True,
            tasks=frozenset(TASKS),
        ),
        tasks="engines.local.checkpoint_tasks:transformers_tasks", tuning="engines.tuning:transformers",
    ),
    "vllm": EngineKind(
        "engines.local.vllm:VLLMEngine", "vllm", "vllm",
        preflight=f"{_LOCAL}check_paths", holds_model=True, parallel_sizes=True, no_float32=True,
        capabilities=Capabilities(images=True, row_adapter=True, extra_body=None, prefill=True, tasks=frozenset(TASKS)),
        tasks="engines.local.vllm_runner:runner_tasks", tuning="engines.tuning:vllm",
    ),
    "sglang_offline": EngineKind(
        "engines.local.sglang:SGLangOfflineEngine", "sglang", "sglang",
        preflight=f"{_LOCAL}check_paths", holds_model=True, tuning="engines.tuning:sglang",
    ),
    "bedrock": EngineKind("engines.remote.bedrock:BedrockEngine", "boto3", "bedrock"),
    **{kind: dataclasses.replace(_HTTP_ENGINE, class_name=name) for kind, name in HTTP_ENGINES.items()},
}  # fmt: skip


def kind_of(config: EngineConfig) -> EngineKind:
    """The facts about this engine. Any kind with a `provider` section is a remote engine: a new provider needs no code."""
    return _kind(config.kind, config.provider)


def _kind(kind: str, provider: Mapping[str, Any] | None) -> EngineKind:
    found = REGISTRY.get(kind, _HTTP_ENGINE)
    return _HTTP_ENGINE if provider and found.holds_model else found


def declared_capabilities(kind: str) -> Capabilities:
    """The capabilities in the registry, for a class whose module imports a heavy library."""
    found = REGISTRY[kind].capabilities
    assert found is not None
    return found


def capabilities_of(config: EngineConfig) -> Capabilities:
    """The capabilities of an engine for its model. Imports no heavy library. Raises `ConfigError`."""
    from engines.remote.provider import Provider

    # engine=sglang_offline asks a server of its own, which engine=sglang describes.
    provider = config.provider or (packaged("sglang")["provider"] if config.kind == "sglang_offline" else {})
    if not provider:
        kind = kind_of(config)
        found = kind.capabilities or engine_class(config.kind).capabilities
        tasks = _imported(kind.tasks)(config) if kind.tasks else None
        return found if tasks is None else dataclasses.replace(found, tasks=found.tasks & tasks)
    return Provider.of(dataclasses.replace(config, provider=provider)).for_model(config.model).capabilities()


def check_task(config: EngineConfig, task: str) -> None:
    """Raises `ConfigError` if an engine does not have a task."""
    if task not in (tasks := capabilities_of(config).tasks):
        raise ConfigError(no_task(task, tasks, config.kind), key="task")


def engine_class(kind: str, provider: Mapping[str, Any] | None = None) -> type[Engine]:
    """The class of an engine, imported now. Raises `ConfigError` for an unknown kind or a missing package."""
    if missing := missing_package(kind, provider):
        raise missing
    entry = REGISTRY.get(kind, _HTTP_ENGINE)
    loaded = _imported(entry.target)
    assert issubclass(loaded, Engine)
    return _provider_class(loaded, entry.class_name, kind) if entry.class_name else loaded


@functools.cache  # one class for each kind, so that `isinstance` holds for every engine of the kind
def _provider_class(base: type[Engine], name: str, kind: str) -> type[Engine]:
    return type(name, (base,), {"kind": kind, "__module__": "engines"})


def _imported(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def missing_package(kind: str, provider: Mapping[str, Any] | None = None) -> ConfigError | None:
    """The error for an unknown kind, or for a package that is not installed; None if the engine can be imported."""
    if kind not in REGISTRY and not provider:
        return ConfigError(no_such_engine(kind, REGISTRY), key="engine")
    entry = REGISTRY.get(kind, _HTTP_ENGINE)
    if entry.package and importlib.util.find_spec(entry.package) is None:
        text = f"engine={kind} needs the package '{entry.package}': run pip install 'eagleray[{entry.extra}]'"
        return ConfigError(text, code=ErrorCode.PACKAGE_MISSING, key=f"engine={kind}")
    return None


def tuning_settings(config: EngineConfig, machine: Machine) -> list[Setting]:
    """The settings that `eagleray tune` tries for this engine. Imports the engine's library, but loads no model."""
    return list(_imported(kind_of(config).tuning)(config, machine))


# -- before a run -------------------------------------------------------------------------------------------------------


def preflight(config: EngineConfig, thorough: bool) -> list[Finding]:
    """Problems of an engine's configuration on this machine; see `Engine.preflight`. Imports no heavy library."""
    if missing := missing_package(config.kind, config.provider):
        return [Finding.of(missing, local=missing.code == ErrorCode.PACKAGE_MISSING)]
    entry = kind_of(config)
    check: Callable[[EngineConfig, bool], list[Finding]]
    check = _imported(entry.preflight) if entry.preflight else engine_class(config.kind, config.provider).preflight
    return check(config, thorough)


def unloaded_engine(config: EngineConfig) -> Engine | None:
    """An engine that checks and renders requests, without secrets; None if its model would have to be loaded."""
    if kind_of(config).holds_model:
        return None
    return engine_class(config.kind, config.provider).unloaded(config)


def request_check(config: EngineConfig) -> Callable[[Request], None] | None:
    """A function that raises `EngineError` for a request that the engine cannot serve. Raises `ConfigError`."""
    if config.unsupported == "drop":
        return None
    capabilities = capabilities_of(config)
    # Some models must be loaded before it is known if they take images.
    able = dataclasses.replace(capabilities, images=capabilities.images or kind_of(config).images_by_model)

    def check(request: Request) -> None:
        error: EngineError | None = able.refusal(request, config)
        if error is not None:
            raise error

    return check


# -- loading ------------------------------------------------------------------------------------------------------------


def load_engine(kind: str | EngineConfig, **keys: Any) -> Engine:
    """An engine, loaded and ready: `load_engine("llamacpp", model=…, kwargs={…})`. Raises `ConfigError`."""
    config = kind if isinstance(kind, EngineConfig) else config_from_keys(kind, keys)
    if not config.fallback:
        return _load(config)
    from engines.fallback import FallbackEngine

    engines: list[Engine] = []
    try:
        for each in (dataclasses.replace(config, fallback=[]), *fallbacks(config)):
            engines.append(load_engine(each))
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return FallbackEngine(engines)


def _load(config: EngineConfig) -> Engine:
    make: Callable[[EngineConfig], Engine] = engine_class(config.kind, config.provider)
    return make(config)


def secret_variables(config: EngineConfig) -> set[str]:
    """The environment variables that a remote engine and its fallbacks may need."""
    names = {config.api_key_env or "", *(config.provider.get("environment") or {}).values()}
    names.update(_CLOUD_VARIABLES.get(str(config.provider.get("auth")), ()))
    for entry in fallbacks(config):
        names |= secret_variables(entry)
    return names - {""}


_CLOUD_VARIABLES = {
    "aws": (
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_BEARER_TOKEN_BEDROCK", "AWS_REGION",
        "AWS_DEFAULT_REGION",
    ),
    "google": ("GOOGLE_APPLICATION_CREDENTIALS",),
}  # fmt: skip


def fallbacks(config: EngineConfig) -> list[EngineConfig]:
    """The engines of `engine.fallback`. Raises `ConfigError`."""
    found = []
    for entry in config.fallback if isinstance(config.fallback, list) else [config.fallback]:
        kind, keys = (entry, {}) if isinstance(entry, str) else (None, {})
        if isinstance(entry, Mapping):
            kind, keys = entry.get("engine"), {name: value for name, value in entry.items() if name != "engine"}
        if not isinstance(kind, str):
            raise ConfigError(
                f"engine.fallback takes names of engines, or mappings with 'engine' and its keys, not {entry!r}",
                key="engine.fallback",
            )
        if kind not in REGISTRY and not keys.get("provider"):
            raise ConfigError(f"engine.fallback: {no_such_engine(kind, REGISTRY)}", key="engine.fallback")
        found.append(config_from_keys(kind, keys))
    return found
