"""A provider's differences from its wire format, as data: the `provider` section of its file in `conf/engine`.

    provider:
      wire: chat                                   # chat | messages | converse (engine=bedrock only)
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
from urllib.parse import urljoin, urlsplit

from engines.config import Capabilities, EngineConfig
from engines.errors import ConfigError, EngineError, ErrorCode, no_such
from engines.params import GENERATION_FIELDS, RESPONSE_FORMATS, GenerationParams
from engines.prices import provider_prices
from engines.remote.schemas import SUBSETS
from engines.remote.task_options import TASK_PATHS, TaskOptions
from engines.tasks import CHAT
from engines.validation import check_keys, check_value, one_of

# wire: openai, anthropic, together, fireworks or google; rows and bytes: the most in one batch, if less than the provider
# takes; queued_tokens: the most in all batches at once; price: the share of the live price, as it was on price_as_of. A
# rule of `models` may have a `batch` with another price. tasks: those beside chat; chat: false if chats have no batches.
BATCH_PRICE = ("price", "price_as_of")
BATCH_KEYS = ("wire", "rows", "bytes", "queued_tokens", "tasks", "chat", *BATCH_PRICE)

BATCH_WIRES = ("openai", "anthropic", "together", "fireworks", "google")
# Keys of a whole provider: one engine has one connection, so a rule of `models` cannot change them for some models.
NOT_BY_MODEL = (
    "wire", "auth", "self_hosted", "headers", "environment", "hosts", "kwargs", "idempotency_header", "prices", "models",
    "lists_models", "ended",
)  # fmt: skip

# The meanings of finish reasons. `server` and `bad_response`: the answer is broken and is asked again.
ENDINGS = ("stop", "length", "tool_calls", "content_filter", "server", "bad_response")
REASONING_HISTORIES = ("all", "tool_calls", "none")

# none: the API cannot continue an answer. last_message: it continues a last message of the assistant. prefix: it needs
# `prefix: true` on this message. continue_final_message: it needs this field in the body.
PREFILLS = ("none", "last_message", "prefix", "continue_final_message")

# optional: as bearer, if a key is given.
AUTHS = ("bearer", "x-api-key", "google", "aws", "optional")
# The wire formats, and the end of the URL to which each is sent. boto3 has its own URLs for `converse`.
WIRE_PATHS = {"chat": "/chat/completions", "messages": "/messages", "converse": ""}


@dataclass(frozen=True)
class Provider:
    """A provider's declared differences from its wire format."""

    wire: str = "chat"
    auth: str = "bearer"  # one of AUTHS
    headers: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)  # {name} in base_url -> the variable that holds it
    hosts: dict[str, str] = field(default_factory=dict)  # a host that base_url leads to -> the host that is asked
    defaults: dict[str, Any] = field(default_factory=dict)  # default values of parameters that the API requires
    rename: dict[str, str] = field(default_factory=dict)
    unsupported: list[str] = field(default_factory=list)
    # A parameter: {another parameter: the value or values with which the first one can be set}. The value null: not set.
    conditions: dict[str, dict[str, Any]] = field(default_factory=dict)
    exclusive: list[list[str]] = field(default_factory=list)  # groups of parameters of which only one can be set
    ignored: list[str] = field(default_factory=list)  # parameters that the API accepts and that have no effect
    formats: dict[str, str] = field(default_factory=dict)  # further types of response_format: their places in the body
    no_formats: list[str] = field(default_factory=list)  # of json_object and json_schema, those the API does not take
    images: bool = True
    fetches_media: bool = True  # images at web addresses are fetched by the provider; False: by Eagleray
    inline_refs: bool = False  # schemas may hold no $ref
    schemas: str | None = None  # the part of JSON Schema that the API takes: a name in `SUBSETS`; None: all of it
    developer_role: bool = False  # the API knows the role `developer`; else it goes as `system`
    self_hosted: bool = False  # the server is the user's own: its address is no part of a request's key
    adapter_model: str | None = None  # the model that asks for an adapter: "{adapter}" or "{model}:{adapter}"
    custom_tools: bool = True  # takes tools of type `custom`; only wire=chat has a form for them
    prompt_caching: bool = False  # caches only what is marked
    stream_above: int | None = None  # `max_tokens` above which the API only answers with a stream
    idempotency_header: str | None = None
    # The provider's finish reasons beside those of its wire format, and what they mean: stop, length, tool_calls or
    # content_filter; `server` or `bad_response` for an answer that is asked again. "null": no reason was given.
    finish_reasons: dict[str, str] = field(default_factory=dict)
    # The answers of a conversation that are sent with their reasoning: all, tool_calls (those that call tools) or none.
    reasoning_history: str = "tool_calls"
    # The way to ask for the continuation of an answer that the messages begin: one of PREFILLS.
    prefill: str = "none"
    kwargs: list[str] = field(default_factory=list)  # the keys under engine.kwargs
    batch: dict[str, Any] = field(default_factory=dict)  # the batch API: `wire`, and the limits in BATCH_KEYS
    tasks: dict[str, Any] = field(default_factory=dict)  # by name, those other than a chat: see `TaskOptions`
    prices: dict[str, Any] = field(default_factory=dict)  # by model: rates as in conf/price, before those lists
    models: list[dict[str, Any]] = field(default_factory=list)
    lists_models: bool = True  # GET …/models answers with the provider's models
    ended: str = ""  # a message about a service that has ended; shown if engine.base_url is not set

    @classmethod
    def of(cls, config: EngineConfig) -> Provider:
        """The checked `provider` section. Raises `ConfigError` with the nearest right name."""
        provider = cls(**_checked(config.provider, "engine.provider"))
        check_value("engine.provider.wire", provider.wire, one_of(WIRE_PATHS))
        check_value("engine.provider.auth", provider.auth, one_of(AUTHS))
        provider_prices(config.provider)
        check_value("engine.provider.reasoning_history", provider.reasoning_history, one_of(REASONING_HISTORIES))
        check_value("engine.provider.prefill", provider.prefill, one_of(PREFILLS))
        check_keys(provider.batch, BATCH_KEYS, "engine.provider.batch")
        if provider.batch:
            _check_batch_wire(provider.batch)
        for rule in provider.models:
            if not isinstance(rule, Mapping) or "match" not in rule:
                raise ConfigError(
                    "engine.provider.models: each needs a 'match', a regular expression of model names",
                    key="engine.provider",
                )
            _check_pattern(rule["match"])
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
        """The price of `model` in a batch as a share of the live one: `batch.price`, 1 if no discount is declared."""
        return float(self.for_model(model).batch.get("price", 1.0))

    def meets_conditions(self, name: str, generation: GenerationParams) -> bool:
        """True if the parameter `name` can be set beside the others in `generation`."""
        needed = self.conditions.get(name, {})
        return all(
            getattr(generation, other) in (value if isinstance(value, list) else [value]) for other, value in needed.items()
        )

    def capabilities(self) -> Capabilities:
        standard = {"json_object", "json_schema"} - set(self.no_formats)
        return Capabilities(
            unsupported=frozenset(self.unsupported),
            conditions={
                name: {other: tuple(value) if isinstance(value, list) else (value,) for other, value in needed.items()}
                for name, needed in self.conditions.items()
            },
            exclusive=tuple(map(tuple, self.exclusive)),
            response_formats=frozenset(standard | set(self.formats)),
            images=self.images,
            fetches_media=self.fetches_media,
            row_model=True,
            row_adapter=self.adapter_model is not None,
            extra_body=None,
            prefill=self.prefill != "none",
            custom_tools=self.custom_tools and self.wire == "chat",
            tasks=frozenset((CHAT, *self.tasks)),
        )

    def task_options(self, task: str) -> TaskOptions:
        return TaskOptions.of(task, self.tasks[task])

    def begin_answer(self, body: dict[str, Any]) -> None:
        """Asks for the continuation of the last message in a body of the format `chat`."""
        if self.prefill == "prefix":
            body["messages"][-1]["prefix"] = True
        elif self.prefill == "continue_final_message":
            body |= {"add_generation_prompt": False, "continue_final_message": True}

    def place(self, body: dict[str, Any], name: str, value: Any) -> None:
        """Puts a parameter into the body where this provider expects it."""
        put(body, self.rename.get(name, name), value)


def _checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    check_keys(values, {f.name for f in dataclasses.fields(Provider)}, where)
    named = {name: list(values.get(name) or ()) for name in ("rename", "unsupported", "ignored", "defaults", "conditions")}
    named["conditions"] += [other for needed in (values.get("conditions") or {}).values() for other in needed]
    named["exclusive"] = [param for group in values.get("exclusive") or () for param in group]
    for name, params in named.items():
        for param in params:
            if param not in GENERATION_FIELDS:
                raise ConfigError(f"{where}.{name}: {no_such('parameter', param, GENERATION_FIELDS)}")
    for name in ("formats", "no_formats"):
        for format in values.get(name) or ():
            if format not in RESPONSE_FORMATS:
                raise ConfigError(f"{where}.{name}: {no_such('type of response_format', format, RESPONSE_FORMATS)}")
    try:
        GenerationParams.parse(values.get("defaults") or {})
    except EngineError as error:
        raise ConfigError(f"{where}.defaults.{error}", key="engine.provider") from None
    for task, options in (values.get("tasks") or {}).items():
        TaskOptions.of(task, options, f"{where}.tasks")
    if values.get("schemas") is not None:
        check_value(f"{where}.schemas", values["schemas"], one_of(SUBSETS))
    for reason, meaning in (values.get("finish_reasons") or {}).items():
        if meaning not in ENDINGS:
            raise ConfigError(f"{where}.finish_reasons.{reason}: {no_such('meaning', str(meaning), ENDINGS)}")
    return dict(values)


def _check_pattern(pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (TypeError, re.error) as error:
        text = f"engine.provider.models: match={pattern} is not a regular expression: {error}"
        raise ConfigError(text, key="engine.provider") from None


def _check_batch_wire(batch: Mapping[str, Any]) -> None:
    if "wire" not in batch:
        raise ConfigError(f"engine.provider.batch needs a wire: one of {', '.join(BATCH_WIRES)}", key="engine.provider")
    check_value("engine.provider.batch.wire", batch["wire"], one_of(BATCH_WIRES))


def _check_effective(rule: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for a key of a `models` rule that would have no effect there."""
    for name in NOT_BY_MODEL:
        if name in rule:
            raise ConfigError(
                f"engine.provider.models: '{name}' is for all models; set engine.provider.{name}", key="engine.provider"
            )
    for name in rule.get("batch") or ():
        if name not in BATCH_PRICE:
            text = f"engine.provider.models: batch can have {' and '.join(BATCH_PRICE)} here, not '{name}'"
            raise ConfigError(f"{text}; set engine.provider.batch.{name}", key="engine.provider")


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
    if not given and provider.ended:
        raise ConfigError(f"engine={config.kind}: {provider.ended}", key="engine.base_url")
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
    url = url.strip()
    if "://" not in url:
        local = re.match(r"(localhost|127\.|0\.0\.0\.0|10\.|192\.168\.|\[::1\]|[^./]+:\d)", url)
        url = f"{'http' if local else 'https'}://{url}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"engine.base_url={url} is not the URL of a server", key="engine.base_url")
    path, given = WIRE_PATHS[provider.wire], parts.path.rstrip("/")
    if path and not given.endswith(path):
        task_path = next((end for end in TASK_PATHS if given.endswith(end)), "")
        given = f"{given.removesuffix(task_path) or '/v1'}{path}"
    # A query, such as Azure's `?api-version=`, stays behind the path.
    return parts._replace(netloc=provider.hosts.get(parts.netloc, parts.netloc), path=given).geturl()


def task_url(url: str, wire: str, path: str) -> str:
    """The URL of another part of the API, by the URL of its chats; `path` is relative to https://…/v1/."""
    parts = urlsplit(url)
    return parts._replace(path=urljoin(f"{parts.path.removesuffix(WIRE_PATHS[wire])}/", path)).geturl()
