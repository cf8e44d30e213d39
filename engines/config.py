"""The configuration of an engine: its keys, its price, its capabilities."""

from __future__ import annotations

import copy
import datetime
import functools
import importlib.resources
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_network
from typing import Any, ClassVar

from engines.errors import ConfigError, EngineError, invalid, nearest
from engines.params import GENERATION_FIELDS, GenerationParams
from engines.tasks import CHAT, no_task, refused_parameter
from engines.types import Request, custom_tool_place, with_effect
from engines.usage import Usage
from engines.validation import Check, Refused, above, at_least, between, check_fields, check_keys, is_whole, number, one_of


def key(default: Any, help: str, check: Check | None = None) -> Any:
    """A configuration key, with the sentence that `--help` and the docs show for it, and the check of its value."""
    metadata = {"help": help, "check": check}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# The check of a price: US dollars per million tokens.
RATE = number(0)
RATES = ("input", "cached_input", "cache_write", "output")


def _rates(*further: str) -> Check:
    """A mapping with rates, at least `input` and `output`, and perhaps `further` keys."""

    def check(name: str, value: Any) -> Any:
        for rate, given in value.items() if isinstance(value, Mapping) else ():
            if rate in RATES:
                RATE(f"{name}.{rate}", given)
            elif rate not in further:
                raise Refused(f"{name} has no '{rate}'{nearest(str(rate), (*RATES, *further))}")
        if not isinstance(value, Mapping) or not {"input", "output"} <= value.keys():
            raise Refused(f"{name} needs input and output, in US$ per million tokens")
        if "tokens" in further and not is_whole(value.get("tokens")):
            raise Refused(f"{name} needs tokens, the number of input tokens above which these rates are in force")
        if value.get("above"):
            ABOVE(f"{name}.above", value["above"])
        return value

    return check


ABOVE = _rates("tokens")
BATCH = _rates("above")


def _rate() -> Any:
    return field(default=None, metadata={"check": RATE})


def _further(check: Check) -> Any:
    return field(default_factory=dict, metadata={"check": lambda name, value: check(name, value) if value else value})


def _day(name: str, value: Any) -> Any:
    try:
        datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        raise Refused.value(name, "a day such as 2027-04-01", value) from None
    return value


@dataclass(slots=True)
class Price:
    """US dollars per million tokens. An unknown rate is None, never 0. `engines/prices.py` looks up list prices."""

    input: float | None = _rate()
    cached_input: float | None = _rate()  # None: as `input`
    output: float | None = _rate()
    as_of: str | None = None  # the date of the price list
    cache_write: float | None = _rate()  # for 5 minutes; None: as `input`
    # The rates of a whole request with more input tokens than `tokens`, a key of this mapping.
    above: dict[str, Any] = _further(ABOVE)
    # The rates in the provider's batches, with an `above` of their own. Empty: the provider's share of the live rates.
    batch: dict[str, Any] = _further(BATCH)
    ends: str | None = field(default=None, metadata={"check": _day})  # when the provider switches the model off

    # Anthropic's rates for writing to the prompt cache: 2.0 times `input` for an hour, 1.25 times `input` for 5 minutes.
    HOUR: ClassVar[float] = 2.0 / 1.25

    @property
    def known(self) -> bool:
        return self.input is not None or self.output is not None

    def at(self, input: float) -> Price:
        """The rates of one request with `input` input tokens."""
        if not self.above or input <= self.above["tokens"]:
            return self
        rates: dict[str, Any] = {name: self.above.get(name) for name in RATES}
        return Price(**rates, as_of=self.as_of)

    def in_batch(self, share: float) -> Price:
        """The rates in the provider's batches: `batch`, or else this share of the live rates."""
        if self.batch:
            return Price(**self.batch, as_of=self.as_of)
        if share == 1.0:
            return self
        scaled: dict[str, Any] = {name: None if (rate := getattr(self, name)) is None else share * rate for name in RATES}
        above = {name: rate if name == "tokens" else share * rate for name, rate in self.above.items()}
        return Price(**scaled, above=above, as_of=self.as_of)

    def parts(
        self, input: float, cached_input: float, output: float, cache_write: float = 0, cache_write_1h: float = 0
    ) -> dict[str, float]:
        """The cost of these tokens in US$, by kind. `input` includes the cached and the written ones.

        An unknown rate adds 0. `above` is not applied: call `at` first.
        """
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
        """The cost of these tokens in US$: the sum of `parts`."""
        if not cached_input and not cache_write:  # most requests
            return input * (self.input or 0.0) / 1e6 + output * (self.output or 0.0) / 1e6
        return sum(self.parts(input, cached_input, output, cache_write, cache_write_1h).values())

    def cost(self, usage: Usage) -> float | None:
        """The cost of one request in US$. None if a rate it needs is unknown, or if its usage is unknown and not free."""
        if not usage.known and not (self.input == 0 == self.output):
            return None
        if (usage.input and self.input is None) or (usage.output and self.output is None):
            return None
        rates = self.at(usage.longest)
        return rates.of(usage.input, usage.cached_input, usage.output, usage.cache_write, usage.cache_write_1h)


def _networks(name: str, value: Any) -> Any:
    try:
        for network in [value] if isinstance(value, str) else value:
            ip_network(network, strict=False)
    except (TypeError, ValueError):
        raise Refused.value(name, "a network such as 10.0.0.0/8, or a list of them", value) from None
    return value


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
    media_private_networks: Any = key(
        [],
        "private networks from which images, audio and video in messages may be fetched, for example [10.0.0.0/8]; "
        "other private, loopback and link-local addresses are refused",
        _networks,
    )
    media_max_bytes: int = key(32 << 20, "maximum bytes of one image, audio or video in a message", at_least(1))
    media_max_pixels: int = key(
        64_000_000, "maximum pixels of one image, for engines that decode it in the worker", between(1, 178_956_970)
    )
    media_timeout_s: float = key(60.0, "maximum seconds to fetch the media of one request, with redirects", above(0))
    fallback: Any = key(
        [],
        "engines for the rows that failed permanently on this one: names, or mappings of the keys of engine; a wrong key, "
        "model, URL or parameter of an engine that has never answered ends the run",
    )
    price: Price = field(
        default_factory=Price,
        metadata={
            "help": "input, cached_input, cache_write, output: US$ per million tokens of engine.model; "
            "unset: the list price, if it is known"
        },
    )


# The help texts of the keys under `generation`.
GENERATION_HELP = {
    "max_tokens": "maximum tokens of an answer",
    "temperature": "sampling temperature; 0 always selects the most likely token",
    "top_p": "sample from the most likely tokens whose probabilities add up to this value, 0 to 1",
    "top_k": "sample from this number of the most likely tokens",
    "min_p": "exclude tokens whose probability is below this share of the most likely token's, 0 to 1",
    "stop": "a text, or a list of texts, that ends an answer",
    "stop_token_ids": "ids of tokens that end an answer",
    "seed": "the seed of the sampling",
    "n": "answers for each row; the column choices contains all of them",
    "frequency_penalty": "penalty for tokens by their number of occurrences, -2 to 2",
    "presence_penalty": "penalty for tokens that occurred before, -2 to 2",
    "repetition_penalty": "penalty factor for tokens that occurred before; 1 means no penalty",
    "logit_bias": "maps a token id to a value that is added to its logit, for example {50256: -100}",
    "logprobs": "log probabilities of this number of alternatives for each token; 0: only the chosen token's",
    "response_format": "the form of an answer: a file with a JSON schema, a schema ({type: object, …}), or "
    "{type: json_schema | json_object | regex | choice | grammar | text, …}",
    "tools": "tools that the model may call, in the format of OpenAI's chat API",
    "tool_choice": "auto, none, required, or one tool in the format of OpenAI's chat API",
    "reasoning_effort": "the effort of a reasoning model, for example low, medium or high",
    "dimensions": "of task=embed: the first numbers of each embedding, normalised again (Matryoshka models) [all]",
    "schema_retries": "maximum retries of an answer that does not match response_format [2]",
}

# The end of a message that begins with the name of an engine.
CANNOT_CONTINUE = (
    "cannot continue an answer that the messages begin (dataset.last_answer=drop or keep; "
    "engine.provider.prefill, if the server can)"
)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The features that an engine supports. A request that needs others is refused before it costs anything."""

    unsupported: frozenset[str] = frozenset()  # names of GenerationParams fields
    # A parameter -> {another parameter: the values with which the first one can be set}. The value None: not set.
    conditions: Mapping[str, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)
    exclusive: tuple[tuple[str, ...], ...] = ()  # at most one parameter of each group can be set
    response_formats: frozenset[str] = frozenset(("json_object", "json_schema", "regex", "choice", "grammar"))
    images: bool = False
    fetches_media: bool = False  # the provider fetches media at web addresses; otherwise Eagleray does
    row_model: bool = False  # a row may name another model
    row_adapter: bool = False  # a row may name another adapter
    # Fields of a row's body that Eagleray does not know itself and passes on. None: all of them.
    extra_body: frozenset[str] | None = frozenset()
    prefill: bool = False  # can continue an answer that the messages begin
    custom_tools: bool = False  # takes OpenAI's tools of type `custom`, which are called with free text
    tasks: frozenset[str] = frozenset((CHAT,))  # see `TASKS`

    def params(self) -> frozenset[str]:
        """The names of the generation parameters that can be set."""
        no_format = frozenset() if self.response_formats else frozenset(("response_format", "schema_retries"))
        taken = {name for name in GENERATION_FIELDS if not all(refused_parameter(task, (name,)) for task in self.tasks)}
        return frozenset(taken) - self.unsupported - no_format

    def refusal(self, request: Request, config: EngineConfig) -> EngineError | None:
        """The error of a request that cannot be served, with the field's name; None if it can."""
        if request.task not in self.tasks:
            return invalid(no_task(request.task, self.tasks, config.kind), key="task")
        if name := refused_parameter(request.task, request.generation.values):
            return invalid(f"generation.{name} has no meaning for task={request.task}", key=f"generation.{name}")
        if problem := self.unsupported_parameter(request.generation):
            text = f"engine={config.kind} does not support {problem[1]}"
            return invalid(f"{text} (model {request.model or config.model}; engine.unsupported=drop leaves it out)")
        if not self.row_model and request.model not in (None, config.model):
            return invalid(f"engine={config.kind} serves {config.model!r} only; this row asks for {request.model!r}")
        if not self.row_adapter and request.adapter not in (None, config.adapter):
            return invalid(f"engine={config.kind} has no adapter for single rows; this row asks for {request.adapter!r}")
        if unknown := self.unknown_fields(request):
            names, drop = ", ".join(unknown), "engine.unsupported=drop leaves it out"
            return invalid(f"engine={config.kind} does not know {names} of the row's body ({drop})")
        if not self.custom_tools and (place := custom_tool_place(request)):
            return invalid(f"engine={config.kind} takes functions as tools only; {place} has a tool of type 'custom'")
        if request.continue_answer:
            if not self.prefill:
                return invalid(f"engine={config.kind} model={request.model or config.model} {CANNOT_CONTINUE}")
            if request.turns:
                return invalid("a row with turns has no beginning of an answer to continue")
        if not self.images:
            for i, message in enumerate(request.messages):
                content = message.get("content")
                if isinstance(content, list) and any(part["type"] != "text" for part in content):
                    return invalid(f"engine={config.kind} takes text only; messages[{i}] has another kind of content")
        return None

    def unknown_fields(self, request: Request) -> list[str]:
        """The fields of a row's body that are not passed on, although they may change the answer."""
        if self.extra_body is None:
            return []
        return [name for name in with_effect(request.extra_body) if name not in self.extra_body]

    def unsupported_parameter(self, generation: GenerationParams) -> tuple[str, str] | None:
        """The first parameter that is set and not supported: its name, and its description in messages."""
        for name, value in generation.values.items():
            if name == "n" and value == 1:
                continue
            if name in self.unsupported:
                return name, f"generation.{name}"
            for other, values in self.conditions.get(name, {}).items():
                if getattr(generation, other) not in values:
                    allowed = " or ".join("unset" if each is None else str(each) for each in values)
                    return name, f"generation.{name} unless generation.{other} is {allowed}"
        for group in self.exclusive:
            first, *further = [name for name in group if getattr(generation, name) is not None] or [""]
            if further:
                return further[0], f"generation.{further[0]} beside generation.{first}"
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
            raise ConfigError(
                f"engine '{kind}' has no key '{name}'{nearest(name, known)}; engine keywords go in kwargs", key="engine"
            )
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
