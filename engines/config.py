"""The configuration of an engine: its keys, its price, its capabilities."""

from __future__ import annotations

import copy
import functools
import importlib.resources
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from engines.errors import ConfigError, EngineError, invalid, nearest
from engines.params import GenerationParams
from engines.types import Request
from engines.usage import Usage
from engines.validation import Check, above, at_least, check_fields, check_keys, number, one_of


def key(default: Any, help: str, check: Check | None = None) -> Any:
    """A configuration key, with the sentence that `--help` and the docs show for it, and the check of its value."""
    metadata = {"help": help, "check": check}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# The check of a price: US dollars per million tokens.
RATE = number(0)


def _rate() -> Any:
    return field(default=None, metadata={"check": RATE})


@dataclass(slots=True)
class Price:
    """US dollars per million tokens. What nobody told is None, never 0; `engines/prices.py` looks up list prices."""

    input: float | None = _rate()
    cached_input: float | None = _rate()  # None: as `input`
    output: float | None = _rate()
    as_of: str | None = None  # the day of the list it is from
    cache_write: float | None = _rate()  # for 5 minutes; None: as `input`

    # Writing to the prompt cache for an hour costs 2.0 times the input where 5 minutes cost 1.25 times.
    HOUR: ClassVar[float] = 2.0 / 1.25

    @property
    def known(self) -> bool:
        return self.input is not None or self.output is not None

    def parts(
        self, input: float, cached_input: float, output: float, cache_write: float = 0, cache_write_1h: float = 0
    ) -> dict[str, float]:
        """US$ for so many tokens, by kind; cached and written ones are among the input. A rate that is not known adds 0."""
        each, cached_input = self.input or 0.0, min(cached_input, input)
        cached = self.cached_input if self.cached_input is not None else each
        write = self.cache_write if self.cache_write is not None else each
        return {
            "input": (input - cached_input - cache_write) * each / 1e6,
            "cached_input": cached_input * cached / 1e6,
            "cache_write": (cache_write + cache_write_1h * (self.HOUR - 1)) * write / 1e6,
            "output": output * (self.output or 0.0) / 1e6,
        }

    def of(
        self, input: float, cached_input: float, output: float, cache_write: float = 0, cache_write_1h: float = 0
    ) -> float:
        """US$ for so many tokens: the sum of `parts`."""
        return sum(self.parts(input, cached_input, output, cache_write, cache_write_1h).values())

    def cost(self, usage: Usage) -> float | None:
        """US$ for a usage. None where the usage is not known, unless all is free, or a rate that it needs."""
        if not usage.known and not (self.input == 0 == self.output):
            return None
        if (usage.input and self.input is None) or (usage.output and self.output is None):
            return None
        return self.of(usage.input, usage.cached_input, usage.output, usage.cache_write, usage.cache_write_1h)


@dataclass(slots=True)
class EngineConfig:
    """The keys under `engine` in the configuration, and the keywords of every engine class.

    Only `kwargs`, `headers` and `extra_body` are open. Secrets are never here: `api_key_env` names the variable.
    """

    kind: str = ""
    model: str | None = key(None, "the model: a path, a hub id or a provider's model name")
    adapter: str | None = key(None, "a LoRA adapter: a path, a hub id, or its name on the server")
    revision: str | None = key(None, "the revision of the model on the hub")
    kwargs: dict[str, Any] = key({}, "keywords of the engine itself, passed on unchanged")
    base_url: Any = key(None, "the URL of a remote engine, or a list of URLs")
    api_key_env: str | None = key(None, "the environment variable that holds the API key")
    headers: dict[str, str] = key({}, "additional HTTP headers")
    extra_body: dict[str, Any] = key({}, "additional fields of every request body")
    max_concurrency: int | None = key(
        None, "maximum requests in flight in one replica; unset: the engine's default", at_least(1)
    )
    requests_per_minute: float | None = key(None, "maximum requests per minute over the whole cluster", above(0))
    input_tokens_per_minute: float | None = key(None, "maximum input tokens per minute over the whole cluster", above(0))
    output_tokens_per_minute: float | None = key(None, "maximum output tokens per minute over the whole cluster", above(0))
    max_retries: int = key(5, "maximum retries of a failed request", at_least(0))
    timeout_s: float = key(600.0, "maximum seconds for one request", above(0))
    provider: dict[str, Any] = key({}, "the settings of a remote provider")
    unsupported: str = key(
        "error",
        "for a parameter that the engine does not support: error refuses the row, drop removes the parameter",
        one_of(("error", "drop")),
    )
    prompt_caching: bool = key(False, "mark the system prompt and the tools for the provider's prompt cache")
    connect_timeout_s: float = key(10.0, "maximum seconds to connect", above(0))
    read_timeout_s: float | None = key(None, "maximum seconds without data within one answer", above(0))
    fallback: Any = key(
        [], "engines for the rows that failed permanently on this one: names, or mappings of the keys of engine"
    )
    price: Price = field(
        default_factory=Price,
        metadata={
            "help": "input, cached_input, cache_write, output: US$ per million tokens of engine.model; "
            "unset: the list price, if it is known"
        },
    )

    # The keywords that change the answer; the others change only the speed.
    ANSWER_KWARGS: ClassVar[tuple[str, ...]] = (
        "chat_template",
        "chat_template_kwargs",
        "default_chat_template_kwargs",
        "filename",
        "requantize",
        "lora_scale",
        "rope_freq_base",
        "rope_freq_scale",
        "rope_scaling_type",
        "bnb_4bit_quant_type",
        "bnb_4bit_compute_dtype",
        "seed",
        "dtype",
        "torch_dtype",
        "load_in_4bit",
        "load_in_8bit",
        "quantization",
        "quantization_config",
        "kv_cache_dtype",
        "hf_overrides",
        "tokenizer",
        "generation_config",
        "override_generation_config",
        "reasoning_parser",
        "tool_call_parser",
        "gguf_file",
        "subfolder",
        "variant",
        "code_revision",
        "tokenizer_revision",
        "tokenizer_mode",
        "rope_scaling",
        "rope_theta",
        "rope_parameters",
        "mm_processor_kwargs",
        "json_model_override_args",
        "bnb_4bit_use_double_quant",
        "llm_int8_threshold",
        "llm_int8_skip_modules",
        "lora_paths",
    )

    def identity(self) -> dict[str, Any]:
        """The part of this configuration that can change an answer: no secrets, no concurrency, no retries."""
        same = {
            "engine": self.kind,
            "model": self.model,
            "adapter": self.adapter,
            "revision": self.revision,
            "wire": self.provider.get("wire"),
            # All endpoints of one service give the same answers: the first stands for them.
            "base_url": self.base_url[0] if isinstance(self.base_url, list) and self.base_url else self.base_url,
            "extra_body": self.extra_body or None,
            "kwargs": {k: v for k, v in self.kwargs.items() if k in self.ANSWER_KWARGS} or None,
        }
        return {name: value for name, value in same.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can and cannot do, so that a request is refused before it costs anything."""

    unsupported: frozenset[str] = frozenset()  # names of GenerationParams fields
    response_formats: frozenset[str] = frozenset(("json_object", "json_schema", "regex", "choice", "grammar"))
    images: bool = False
    row_model: bool = False  # a row may name another model
    row_adapter: bool = False  # a row may name another adapter

    def refuse(self, request: Request, config: EngineConfig) -> EngineError | None:
        """The reason why this request cannot be served, with the field's name; None if it can."""
        if reason := self.lacks(request.generation):
            return invalid(f"engine={config.kind} does not support {reason[1]} (engine.unsupported=drop leaves it out)")
        if not self.row_model and request.model not in (None, config.model):
            return invalid(f"engine={config.kind} serves {config.model!r} only; this row asks for {request.model!r}")
        if not self.row_adapter and request.adapter not in (None, config.adapter):
            return invalid(f"engine={config.kind} has no adapter for single rows; this row asks for {request.adapter!r}")
        if not self.images:
            for i, message in enumerate(request.messages):
                content = message.get("content")
                if isinstance(content, list) and any(part["type"] != "text" for part in content):
                    return invalid(f"engine={config.kind} takes text only; messages[{i}] has another kind of content")
        return None

    def lacks(self, generation: GenerationParams) -> tuple[str, str] | None:
        """The first parameter that is set and not supported: its name, and how messages call it; None if there is none."""
        for name in self.unsupported:
            value = getattr(generation, name)
            if value is not None and not (name == "n" and value == 1):
                return name, f"generation.{name}"
        response_format = generation.response_format
        if response_format is not None and response_format["type"] not in self.response_formats:
            return "response_format", f"generation.response_format of type {response_format['type']}"
        return None


# Makes the function that an engine asks for its share of a key's limits.
SourceOf = Callable[[EngineConfig], Any]


def config_from_keys(kind: str, keys: Mapping[str, Any]) -> EngineConfig:
    """The packaged keys of an engine, replaced by `keys` where given. Raises `ConfigError` for a wrong key or value."""
    known = {f.name for f in fields(EngineConfig)} - {"kind"}
    for name in keys:
        if name not in known:
            raise ConfigError(f"engine '{kind}' has no key '{name}'{nearest(name, known)}; engine keywords go in kwargs")
    values = {**packaged(kind), **keys, "kind": kind}
    if isinstance(price := values.get("price"), Mapping):
        check_keys(price, {f.name for f in fields(Price)}, "engine.price")
        values["price"] = Price(**price)
    config = EngineConfig(**values)
    check_fields("engine", config)
    check_fields("engine.price", config.price)
    return config


@functools.cache
def _packaged_keys(kind: str) -> dict[str, Any]:
    import yaml

    file = importlib.resources.files("conf") / "engine" / f"{kind}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def packaged(kind: str) -> dict[str, Any]:
    """The keys in `conf/engine/<kind>.yaml`; none if there is no such file."""
    return copy.deepcopy(_packaged_keys(kind))
