"""The one interface of every engine, local or remote: `await engine.generate(request) -> Completion`."""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib
import importlib.resources
import importlib.util
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self, TypeVar

from engines.batch.api import Batches
from engines.script import ask_turns
from engines.structured import ask_in_shape
from engines.types import (
    Completion,
    ConfigError,
    Conversation,
    Delta,
    EngineError,
    Failure,
    GenerationParams,
    Request,
    Stream,
    Usage,
    check_messages,
    invalid,
    nearest,
    text_of,
)

T = TypeVar("T")


def key(default: Any, help: str) -> Any:
    """A configuration key, with the sentence that `--help` and the docs show for it."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(slots=True)
class Price:
    """US dollars per million tokens. What nobody told is None, never 0; `engines/prices.py` looks up list prices."""

    input: float | None = None
    cached_input: float | None = None  # None: as `input`
    output: float | None = None
    as_of: str | None = None  # the day of the list it is from
    cache_write: float | None = None  # for 5 minutes; None: as `input`

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
    model: str | None = key(None, "which model: a path, a hub id or a provider's name for it")
    adapter: str | None = key(None, "a LoRA adapter: a path or a hub id")
    revision: str | None = key(None, "the model's revision on the hub")
    kwargs: dict[str, Any] = key({}, "the engine's own keywords, passed through")
    base_url: Any = key(None, "where a remote engine listens")
    api_key_env: str | None = key(None, "the environment variable that holds the key")
    headers: dict[str, str] = key({}, "further HTTP headers")
    extra_body: dict[str, Any] = key({}, "further fields of every request's body")
    max_concurrency: int | None = key(None, "requests in flight in one replica; unset leaves it to the engine")
    requests_per_minute: float | None = key(None, "limit over the whole cluster")
    input_tokens_per_minute: float | None = key(None, "limit over the whole cluster")
    output_tokens_per_minute: float | None = key(None, "limit over the whole cluster")
    max_retries: int = key(5, "how often a failed request is tried again")
    timeout_s: float = key(600.0, "how long one request may take")
    provider: dict[str, Any] = key({}, "what is particular to a remote provider; see engines/remote/provider.py")
    unsupported: str = key("error", "a parameter the engine does not have: error refuses the row, drop leaves it out")
    prompt_caching: bool = key(False, "mark system prompt and tools for the provider's prompt cache")
    connect_timeout_s: float = key(10.0, "how long connecting may take")
    read_timeout_s: float | None = key(None, "how long a server may be silent within one answer")
    fallback: Any = key([], "engines that get a row this one failed for good: names, or mappings of the keys here")
    price: Price = field(
        default_factory=Price,
        metadata={
            "help": "input, cached_input, cache_write, output of engine.model: US$ per million tokens; unset: the list "
            "price, where it is known"
        },
    )

    # The keywords that change what is asked or which numbers answer; the others change only how fast.
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
        """What of this configuration belongs to a request's identity: never secrets, concurrency, retries or speed."""
        same = {
            "engine": self.kind,
            "model": self.model,
            "adapter": self.adapter,
            "revision": self.revision,
            "wire": self.provider.get("wire"),
            # More endpoints of one service answer the same: the first names it.
            "base_url": self.base_url[0] if isinstance(self.base_url, list) and self.base_url else self.base_url,
            "extra_body": self.extra_body or None,
            "kwargs": {k: v for k, v in self.kwargs.items() if k in self.ANSWER_KWARGS} or None,
        }
        return {name: value for name, value in same.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine cannot do, so that a request is refused before anything is spent on it."""

    unsupported: frozenset[str] = frozenset()  # names of GenerationParams fields
    response_formats: frozenset[str] = frozenset(("json_object", "json_schema", "regex", "choice", "grammar"))
    images: bool = False
    row_model: bool = False  # a row may name another model
    row_adapter: bool = False  # a row may name another adapter

    def refuse(self, request: Request, config: EngineConfig) -> EngineError | None:
        """The reason why this request cannot be served, naming the field; None where it can."""
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
        """The first parameter that is set and not supported: its name, and what to call it. None where all are."""
        for name in self.unsupported:
            value = getattr(generation, name)
            if value is not None and not (name == "n" and value == 1):
                return name, f"generation.{name}"
        response_format = generation.response_format
        if response_format is not None and response_format["type"] not in self.response_formats:
            return "response_format", f"generation.response_format of type {response_format['type']}"
        return None


# Makes the place where an engine asks for its share of a key's limits.
SourceOf = Callable[[EngineConfig], Any]

# kind -> (module:Class, the module that must be importable, the extra that installs it)
REGISTRY: dict[str, tuple[str, str | None, str]] = {
    "echo": ("engines.echo:EchoEngine", None, ""),
    "llamacpp": ("engines.llamacpp:LlamaCppEngine", "llama_cpp", "llamacpp"),
    "transformers": ("engines.transformers:TransformersEngine", "transformers", "transformers"),
    "vllm": ("engines.vllm:VLLMEngine", "vllm", "vllm"),
    "sglang_offline": ("engines.sglang:SGLangOfflineEngine", "sglang", "sglang"),
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

# These hold one model: the model names in an OpenAI batch file's lines do not apply to them.
SINGLE_MODEL_KINDS = frozenset(("llamacpp", "transformers", "vllm", "sglang_offline"))


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
    loaded = engine_class(config.kind, config.provider)
    if not config.fallback:
        return loaded(config)
    from engines.fallback import FallbackEngine

    return FallbackEngine(config)


class Engine(Batches, ABC):
    """Base class. A subclass loads its model in `_load` and answers in `_generate`; both may raise our errors only.

    `generate` may be awaited from any number of tasks at once: engines batch by themselves.
    """

    kind: ClassVar[str]
    capabilities: ClassVar[Capabilities] = Capabilities()
    max_outage_s: float = 900.0  # how long a remote engine's server may be silent
    # Told that a try failed which may have to be paid, and its cost in US$ (None: not known); whether there is money for
    # another one.
    afford: Callable[[Request, float | None], Awaitable[bool]] | None = None
    outage: str | None = None  # set where it was for longer: rows then fail for no fault of theirs

    def __init__(self, config: EngineConfig | None = None, /, **keys: Any) -> None:
        self.config = config if config is not None else config_from_keys(self.kind, keys)
        self._dropped: set[str] = set()
        self._prices: dict[tuple[str | None, str | None], Price] = {}
        self.counts: Counter[str] = Counter()  # for metrics: what only the engine sees
        self._load()

    def _load(self) -> None:
        """Loads the model. Raises `ConfigError` where the configuration cannot work."""

    @abstractmethod
    async def _generate(self, request: Request) -> Completion:
        """Answers one request, or raises `EngineError`."""

    @property
    def concurrency(self) -> int:
        """How many requests this engine wants in flight to be fully busy."""
        return self.config.max_concurrency or 64

    @property
    def admitted(self) -> float | None:
        """How many requests may be in flight just now, where that changes with the server's load."""
        return None

    @property
    def trouble(self) -> str:
        """Why nothing goes on at the moment; empty where something does."""
        return ""

    async def generate(self, request: Request) -> Completion:
        """Answers one request; what goes wrong with it is in the completion's `error`. Other exceptions are bugs.

        An answer that is not in the shape asked for is asked for again; `turns` are asked one after the other.
        """
        return await ask_turns(functools.partial(ask_in_shape, self._answer), request)

    async def _answer(self, request: Request) -> Completion:
        """Asks the model once."""
        started = time.perf_counter()
        try:
            completion = await self._generate(self.prepared(request))
        except EngineError as error:
            completion = Completion(error=Failure.of(error), usage=error.usage or Usage(), attempts=error.attempts)
        if not completion.latency_s:  # a remote engine tells how long the answer itself took, without the waits before it
            completion.latency_s = time.perf_counter() - started
        completion.engine = self.kind
        completion.cost_usd = self.cost(completion.usage, request.model, completion.model)
        if completion.model is None:
            completion.model = request.model or self.config.model
        return completion

    def cost(self, usage: Usage, asked: str | None, answered: str | None = None, *, batch: bool = False) -> float | None:
        """US$ for the usage of a request for the model `asked` (None: the engine's own), by the price of that model; where
        it has none, by that of the model that `answered`. None where it is not known. A local engine without a price is
        free.
        """
        if not usage.input and not usage.output and usage.known:
            return 0.0
        if not self.config.provider:  # a rate that is not set is free
            return self.config.price.of(usage.input, usage.cached_input, usage.output, usage.cache_write)
        if (asked, answered) not in self._prices:
            from engines.prices import price_of

            self._prices[asked, answered] = price_of(self.config, asked, answered)
        cost = self._prices[asked, answered].cost(usage)
        return None if cost is None else cost * (self.batch_share(asked) if batch else 1.0)

    def batch_share(self, model: str | None) -> float:
        """The price of this model in a provider's batch, as a share of the live one."""
        return 1.0

    async def stream(self, request: Request) -> AsyncGenerator[Delta | Completion, None]:
        """As `generate`, with the text piece by piece as it comes, where the engine can; else whole at the end.

        The last item is the `Completion`. The pieces before it add up to the texts in it, unless it is an error: one that
        comes after the first piece was not retried. Tool calls and log probabilities are in the completion only.
        """
        pieces: asyncio.Queue[Delta | None] = asyncio.Queue()
        task = asyncio.create_task(self.generate(replace(request, stream=Stream(pieces))))
        task.add_done_callback(lambda _: pieces.put_nowait(None))
        texts: Counter[int] = Counter()  # characters so far, by choice
        thoughts = 0
        try:
            while (piece := await pieces.get()) is not None:
                texts[piece.index] += len(piece.text)
                thoughts += len(piece.reasoning)
                yield piece
            completion = await task
            rest = Delta(reasoning=(completion.reasoning or "")[thoughts:])
            if rest.reasoning:
                yield rest
            for at, choice in enumerate(completion.choices):
                if text := (text_of(choice.message) or "")[texts[at] :]:
                    yield Delta(text, index=at)
            yield completion
        finally:
            task.cancel()

    def prepared(self, request: Request) -> Request:
        """The request as this engine can serve it. Raises `EngineError("invalid_input")` where it cannot."""
        capabilities = self.capabilities_for(request)
        if self.config.unsupported == "drop":
            request = self._without_unsupported(request, capabilities)
        if refused := capabilities.refuse(request, self.config):
            refused.attempts = 0
            raise refused
        return request

    def capabilities_for(self, request: Request) -> Capabilities:
        """What can be asked of the model this request goes to."""
        return self.capabilities

    def check(self, generation: GenerationParams) -> None:
        """Raises `ConfigError` where no row could be asked with these parameters."""
        request = Request([], generation)
        lack = self.capabilities_for(request).lacks(generation)
        if lack and self.config.unsupported != "drop":
            raise ConfigError(
                f"{lack[1]} is not supported by engine={self.config.kind} model={self.config.model} "
                "(engine.unsupported=drop leaves it out)"
            )

    def _without_unsupported(self, request: Request, capabilities: Capabilities) -> Request:
        while lack := capabilities.lacks(request.generation):
            if lack[1] not in self._dropped:
                self._dropped.add(lack[1])
                warnings.warn(f"engine={self.config.kind} does not support {lack[1]}: left out", stacklevel=2)
            request = replace(request, generation=replace(request.generation, **{lack[0]: None}))
        return request

    def attach(self, source_of: SourceOf, max_outage_s: float) -> None:
        """Called by the pipeline: where the limits of the whole cluster are kept, and how long to wait for a server."""

    def drain(self) -> None:
        """Requests that only wait (to be asked again, for their turn) end as `cancelled`; those in flight go on."""

    def infer(
        self,
        conversations: Iterable[Conversation | Mapping[str, Any]],
        generation: GenerationParams | Mapping[str, Any] | None = None,
    ) -> list[Completion]:
        """Answers all conversations, at most `concurrency` at once, and returns the completions in their order.

        Takes `Conversation`s or dicts with `messages` (and optionally `id`, `generation`, `model`, `adapter`).
        A conversation that is not valid, or that fails, gets a completion with `error`; nothing else is lost.
        """
        base = generation if isinstance(generation, GenerationParams) else GenerationParams.parse(generation or {})
        return run_sync(self._infer(list(conversations), base))

    async def _infer(
        self, conversations: list[Conversation | Mapping[str, Any]], base: GenerationParams
    ) -> list[Completion]:
        slots = asyncio.Semaphore(self.concurrency)

        async def one(conversation: Conversation | Mapping[str, Any]) -> Completion:
            try:
                request = to_request(conversation, base)
            except EngineError as error:
                return Completion(error=Failure.of(error), engine=self.kind, model=self.config.model)
            async with slots:
                return await self.generate(request)

        return await asyncio.gather(*(one(conversation) for conversation in conversations))

    def close(self) -> None:
        """Frees the model. An engine cannot be used after it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)


def config_from_keys(kind: str, keys: Mapping[str, Any]) -> EngineConfig:
    """The packaged keys of an engine with `keys` laid over; an unknown one is refused with the nearest right name."""
    known = {f.name for f in fields(EngineConfig)} - {"kind"}
    for name in keys:
        if name not in known:
            raise ConfigError(f"engine '{kind}' has no key '{name}'{nearest(name, known)}; engine keywords go in kwargs")
    values = {**packaged(kind), **keys, "kind": kind}
    if isinstance(price := values.get("price"), Mapping):
        rates = {f.name for f in fields(Price)}
        for name, value in price.items():
            if name not in rates:
                raise ConfigError(f"engine '{kind}' has no key 'price.{name}'{nearest(str(name), rates)}")
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
            if name != "as_of" and value is not None and not number:
                raise ConfigError(f"price.{name} of engine '{kind}' must be a number of at least 0, not {value!r}")
        values["price"] = Price(**price)
    return EngineConfig(**values)


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


@functools.cache
def _packaged(kind: str) -> dict[str, Any]:
    import yaml

    file = importlib.resources.files("conf") / "engine" / f"{kind}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def packaged(kind: str) -> dict[str, Any]:
    """The keys in `conf/engine/<kind>.yaml`; none where there is no such file."""
    return copy.deepcopy(_packaged(kind))


_CONVERSATION_KEYS = frozenset(f.name for f in fields(Conversation))


def to_request(conversation: Conversation | Mapping[str, Any], base: GenerationParams) -> Request:
    """A conversation with its own overrides laid over `base`. Raises `EngineError("invalid_input")`."""
    if isinstance(conversation, Mapping):
        if "messages" not in conversation:
            raise invalid(f"a conversation needs 'messages'; this one has {', '.join(map(str, conversation)) or 'nothing'}")
        conversation = Conversation(**{k: v for k, v in conversation.items() if k in _CONVERSATION_KEYS})
    if not isinstance(conversation, Conversation):
        raise invalid(f"a conversation is a Conversation or a mapping, not {type(conversation).__name__}")
    if conversation.generation and not isinstance(conversation.generation, Mapping):
        raise invalid(f"generation must be a mapping of parameters, not {conversation.generation!r:.60}")
    if not isinstance(conversation.turns, list):
        raise invalid(f"turns must be a list of what the user says, not {conversation.turns!r:.60}")
    return Request(
        messages=check_messages(conversation.messages),
        generation=base.override(conversation.generation or {}),
        model=conversation.model,
        adapter=conversation.adapter,
        key=conversation.id or "",
        turns=conversation.turns,
    )


def run_sync(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end, also where a loop already runs (a notebook): then in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(work))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="eagleray-infer")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
