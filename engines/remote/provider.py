"""A provider's differences from its wire format, as data: the `provider` section of its file in `conf/engine`.

    provider:
      wire: chat                                   # chat | messages | converse
      rename: {max_tokens: max_completion_tokens}  # our parameter: its place in the body, with dots for depth
      unsupported: [top_k]                         # parameters that the API refuses; rows with them are not sent
      models:                                      # the same keys for some models only; they replace those above
        - match: ^o[134]
          unsupported: [temperature]

A provider with OpenAI's chat completions API needs only `wire: chat`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from engines.config import Capabilities, EngineConfig
from engines.errors import ConfigError, ErrorCode, no_such
from engines.params import GENERATION_FIELDS
from engines.validation import check_keys, check_value, one_of

# wire: openai, anthropic, together or fireworks; rows and bytes: the most in one batch, where less than the provider takes;
# queued_tokens: the most in all batches at once; price: the share of the live price, as it was on price_as_of. A rule of
# `models` may have a `batch` with another price.
BATCH_PRICE = ("price", "price_as_of")
BATCH_KEYS = ("wire", "rows", "bytes", "queued_tokens", *BATCH_PRICE)

BATCH_WIRES = ("openai", "anthropic", "together", "fireworks")
# Keys of a whole provider: one engine has one connection, so a rule of `models` cannot change them for some models.
NOT_BY_MODEL = ("wire", "auth", "headers", "environment", "kwargs", "idempotency_header", "prices", "models")

# What a finish reason can mean. `server` and `bad_response`: the answer is broken and is asked again.
ENDINGS = ("stop", "length", "tool_calls", "content_filter", "server", "bad_response")
REASONING_HISTORIES = ("all", "tool_calls", "none")

WIRE_PATHS = {"chat": "/chat/completions", "messages": "/messages", "converse": ""}


@dataclass(frozen=True)
class Provider:
    """A provider's declared differences from its wire format."""

    wire: str = "chat"
    auth: str = "bearer"  # bearer | x-api-key | google | aws | optional (bearer, where a key is given)
    headers: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)  # {name} in base_url -> the variable that holds it
    defaults: dict[str, Any] = field(default_factory=dict)  # generation parameters the API cannot do without
    rename: dict[str, str] = field(default_factory=dict)
    unsupported: list[str] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)  # further types of response_format: where they go in the body
    no_formats: list[str] = field(default_factory=list)  # of json_object and json_schema, those the API does not take
    images: bool = True
    inline_refs: bool = False  # schemas may hold no $ref
    developer_role: bool = False  # the API knows the role `developer`; else it goes as `system`
    adapter_model: str | None = None  # the model that asks for an adapter: "{adapter}" or "{model}:{adapter}"
    prompt_caching: bool = False  # caches only what is marked
    idempotency_header: str | None = None
    # The provider's finish reasons beside those of its wire, and what they mean: stop, length, tool_calls or
    # content_filter; `server` or `bad_response` for an answer that is asked again. "null": no reason was given.
    finish_reasons: dict[str, str] = field(default_factory=dict)
    # Which of a conversation's answers are sent with their reasoning: all, tool_calls (those that call tools) or none.
    reasoning_history: str = "tool_calls"
    kwargs: list[str] = field(default_factory=list)  # the keys under engine.kwargs
    batch: dict[str, Any] = field(default_factory=dict)  # the batch API: `wire`, and the limits in BATCH_KEYS
    prices: dict[str, Any] = field(default_factory=dict)  # by model: rates as in conf/price, before those lists
    models: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, config: EngineConfig) -> Provider:
        """The checked `provider` section. Raises `ConfigError` with the nearest right name."""
        provider = cls(**_checked(config.provider, "engine.provider"))
        check_value("engine.provider.wire", provider.wire, one_of(WIRE_PATHS))
        check_value("engine.provider.reasoning_history", provider.reasoning_history, one_of(REASONING_HISTORIES))
        check_keys(provider.batch, BATCH_KEYS, "engine.provider.batch")
        if provider.batch:
            _check_batch_wire(provider.batch)
        for rule in provider.models:
            if not isinstance(rule, Mapping) or "match" not in rule:
                raise ConfigError("engine.provider.models: each needs a 'match', a regular expression of model names")
            _checked({name: value for name, value in rule.items() if name != "match"}, "engine.provider.models")
            _check_effective(rule)
        return provider

    def for_model(self, model: str | None) -> Provider:
        """With the rules for this model applied: lists are joined, mappings merged, other values replaced."""
        found = self
        for rule in self.models:
            if model and re.search(rule["match"], model):
                changes: dict[str, Any] = {}
                for name, value in rule.items():
                    before = getattr(found, name, None)
                    if isinstance(value, Mapping):
                        changes[name] = {**(before or {}), **value}
                    elif isinstance(value, list):
                        changes[name] = [*(before or []), *value]
                    elif name != "match":
                        changes[name] = value
                found = dataclasses.replace(found, **changes)
        return found

    def batch_share(self, model: str | None) -> float:
        """The price of `model` in a batch as a share of the live one: `batch.price`, 1 where no discount is declared."""
        return float(self.for_model(model).batch.get("price", 1.0))

    def capabilities(self) -> Capabilities:
        standard = {"json_object", "json_schema"} - set(self.no_formats)
        return Capabilities(
            unsupported=frozenset(self.unsupported),
            response_formats=frozenset(standard | set(self.formats)),
            images=self.images,
            row_model=True,
            row_adapter=self.adapter_model is not None,
        )

    def place(self, body: dict[str, Any], name: str, value: Any) -> None:
        """Puts a parameter into the body where this provider expects it."""
        put(body, self.rename.get(name, name), value)


def _checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    check_keys(values, {f.name for f in dataclasses.fields(Provider)}, where)
    for name in ("rename", "unsupported", "defaults"):
        for param in values.get(name) or ():
            if param not in GENERATION_FIELDS:
                raise ConfigError(f"{where}.{name}: {no_such('parameter', param, GENERATION_FIELDS)}")
    for reason, meaning in (values.get("finish_reasons") or {}).items():
        if meaning not in ENDINGS:
            raise ConfigError(f"{where}.finish_reasons.{reason}: {no_such('meaning', str(meaning), ENDINGS)}")
    return dict(values)


def _check_batch_wire(batch: Mapping[str, Any]) -> None:
    if "wire" not in batch:
        raise ConfigError(f"engine.provider.batch needs a wire: one of {', '.join(BATCH_WIRES)}")
    check_value("engine.provider.batch.wire", batch["wire"], one_of(BATCH_WIRES))


def _check_effective(rule: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for a key of a `models` rule that would have no effect there."""
    for name in NOT_BY_MODEL:
        if name in rule:
            raise ConfigError(f"engine.provider.models: '{name}' is for all models; set engine.provider.{name}")
    for name in rule.get("batch") or ():
        if name not in BATCH_PRICE:
            text = f"engine.provider.models: batch can have {' and '.join(BATCH_PRICE)} here, not '{name}'"
            raise ConfigError(f"{text}; set engine.provider.batch.{name}")


def put(body: dict[str, Any], path: str, value: Any) -> None:
    """`put(body, "a.b", 1)` is `body["a"]["b"] = 1`; missing mappings on the way are created."""
    *above, last = path.split(".")
    for name in above:
        body = body.setdefault(name, {})
    body[last] = value


def merge(body: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Writes `extra` into `body`; nested mappings are merged."""
    for name, value in extra.items():
        if isinstance(value, Mapping) and isinstance(body.get(name), dict):
            merge(body[name], value)
        else:
            body[name] = value


def endpoints(config: EngineConfig, provider: Provider) -> list[str]:
    """The full URLs of requests. `engine.base_url` may be a host, a URL up to `/v1`, or the full path."""
    given = config.base_url
    if not given:
        raise ConfigError(f"engine={config.kind} needs engine.base_url: the URL of the server", key="engine.base_url")
    urls = given if isinstance(given, list) else [given]
    return [_endpoint(str(url), provider, config.kind) for url in urls]


def _endpoint(url: str, provider: Provider, kind: str) -> str:
    for name, variable in provider.environment.items():
        if f"{{{name}}}" in url:
            value = os.environ.get(variable)
            if not value:
                text = f"engine={kind} needs the environment variable {variable} ({name} in its URL)"
                raise ConfigError(text, code=ErrorCode.KEY_MISSING, key="engine.base_url")
            url = url.replace(f"{{{name}}}", value)
    url = url.strip().rstrip("/")
    if "://" not in url:
        local = re.match(r"(localhost|127\.|0\.0\.0\.0|10\.|192\.168\.|\[::1\]|[^./]+:\d)", url)
        url = f"{'http' if local else 'https'}://{url}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"engine.base_url={url} is not the URL of a server", key="engine.base_url")
    path = WIRE_PATHS[provider.wire]
    if path and parts.path.endswith(path):
        return url
    return f"{url}/v1{path}" if path and not parts.path else f"{url}{path}"


def inline_refs(schema: Any) -> Any:
    """A JSON schema with every local `$ref` replaced by its target. Raises `ValueError` if a target contains itself."""

    def resolve(node: Any, above: tuple[str, ...]) -> Any:
        if isinstance(node, list):
            return [resolve(item, above) for item in node]
        if not isinstance(node, dict):
            return node
        ref = node.get("$ref")
        if isinstance(ref, str) and ref.startswith("#"):
            if ref in above:
                raise ValueError(f"the schema refers to itself at {ref}, which this provider does not take")
            target: Any = schema
            try:
                for name in ref.lstrip("#/").split("/") if ref != "#" else ():
                    name = name.replace("~1", "/").replace("~0", "~")
                    target = target[int(name)] if isinstance(target, list) else target[name]
            except (KeyError, IndexError, ValueError, TypeError):
                raise ValueError(f"the schema has nothing at {ref}") from None
            beside = {name: resolve(value, above) for name, value in node.items() if name != "$ref"}
            found = resolve(target, (*above, ref))
            return {**found, **beside} if isinstance(found, dict) else found
        return {name: resolve(value, above) for name, value in node.items() if name not in ("$defs", "definitions")}

    return resolve(schema, ())
