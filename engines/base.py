"""The interface of every engine, local or remote: `await engine.generate(request) -> Completion`.

Callers use `Engine`. `ModelEngine` is the base of engines that ask a model; it adds the steps that all answers share.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from engines.config import Capabilities, EngineConfig, Price, config_from_keys
from engines.errors import ConfigError, EngineError, Failure, Finding, forget_frames
from engines.media import has_media, load_media
from engines.params import GenerationParams
from engines.prices import price_of
from engines.rendering import render_messages
from engines.structured import generate_validated
from engines.tasks import CHAT, check_values, is_chat
from engines.turns import generate_turns
from engines.types import Completion, Conversation, Delta, Request, Stream, text_of, to_request
from engines.usage import Usage

if TYPE_CHECKING:
    from engines.remote.controls import RemoteControls

T = TypeVar("T")


class _OnEngineOrClass:
    """A method whose first argument is the engine, or the class if it is called on the class."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    def __get__(self, engine: Engine | None, cls: type[Engine]) -> Callable[..., frozenset[str]]:
        return MethodType(self.function, cls if engine is None else engine)


class Engine(ABC):
    """Answers requests. `generate` may be awaited by any number of tasks at once: engines batch by themselves."""

    kind: ClassVar[str]
    capabilities: ClassVar[Capabilities] = Capabilities()
    runs_here: ClassVar[bool] = True  # False: a provider runs the model, and its tokens cost what its price list says
    config: EngineConfig

    @abstractmethod
    async def generate(self, request: Request) -> Completion:
        """Answers one request. A failure is in the completion's `error`; any exception is a bug."""

    @property
    def concurrency(self) -> int:
        """The number of requests in flight that keeps this engine fully busy."""
        return self.config.max_concurrency or 64

    def concurrency_for(self, task: str) -> int:
        """As `concurrency`, for rows of a task: an engine may put several rows into one request."""
        return self.concurrency

    @property
    def lowered_to(self) -> int | None:
        """The requests that the engine computes at once since its memory ran out; None: it did not."""
        return None

    @property
    def remote(self) -> RemoteControls | None:
        """Limits, outages and draining, for engines that ask a server; None for engines that run here."""
        return None

    def at(self, place: int) -> Engine:
        """The engine that gave a completion of this `place`: this one, unless it has fallbacks."""
        return self

    # -- before a request ---------------------------------------------------------------------------------------------

    @classmethod
    def preflight(cls, config: EngineConfig, thorough: bool) -> list[Finding]:
        """Problems of this configuration on this machine: paths, keys, URLs. Loads no model and sends nothing.

        `thorough` allows checks that import the engine's own library.
        """
        return []

    @classmethod
    def unloaded(cls, config: EngineConfig) -> Engine | None:
        """An engine for `check`, `prepared` and `render_request` only, without secrets.

        None if only a loaded model could tell. Raises `ConfigError`.
        """
        return None

    def check(self, generation: GenerationParams) -> None:
        """Raises `ConfigError` if the engine would refuse every request with these parameters."""
        problem = self.capabilities_for(Request([], generation)).unsupported_parameter(generation)
        if problem and self.config.unsupported != "drop":
            raise ConfigError(
                f"{problem[1]} is not supported by engine={self.config.kind} model={self.config.model} "
                "(engine.unsupported=drop leaves it out)",
                key="engine.unsupported",
            )

    @_OnEngineOrClass
    def supported_params(self, model: str | None = None) -> frozenset[str]:
        """The names of the generation parameters that the engine supports for a model; None: for its own model.

        A class can be asked too, without an API key: `OpenAIEngine.supported_params("o3")`. Then None stands for a model
        without rules of its own. A supported parameter may still be refused beside another one, or for some of its values.
        """
        if isinstance(self, type):
            return self.class_capabilities(model).params()
        return self.capabilities_for(Request([], model=model)).params()

    @classmethod
    def class_capabilities(cls, model: str | None) -> Capabilities:
        """The capabilities for a model before an engine is made."""
        return cls.capabilities

    def capabilities_for(self, request: Request) -> Capabilities:
        """The capabilities of the model that this request goes to."""
        return self.capabilities

    def prepared(self, request: Request) -> Request:
        """The request as this engine can serve it. Raises `EngineError("invalid_input")` if it cannot."""
        capabilities = self.capabilities_for(request)
        if self.config.unsupported == "drop":
            while problem := capabilities.unsupported_parameter(request.generation):
                self._warn_dropped(problem[1])
                request = replace(request, generation=replace(request.generation, **{problem[0]: None}))
            if unknown := capabilities.unknown_fields(request):
                self._warn_dropped(", ".join(unknown))
                kept = {name: value for name, value in request.extra_body.items() if name not in unknown}
                request = replace(request, extra_body=kept)
        if refused := capabilities.refusal(request, self.config):
            refused.attempts = 0
            raise refused
        return request

    @functools.cached_property
    def _dropped(self) -> set[str]:
        return set()

    def check_request(self, request: Request) -> None:
        """Raises `EngineError` for a request that cannot be sent as it is."""
        self.prepared(request)

    def _warn_dropped(self, name: str) -> None:
        if name not in self._dropped:
            self._dropped.add(name)
            warnings.warn(f"engine={self.config.kind} does not support {name}: left out", stacklevel=3)

    def render_request(self, request: Request) -> str:
        """The request as text, for people: what would be sent, or the messages. Secrets are hidden.

        Raises `EngineError` for a request that this engine cannot serve.
        """
        return render_messages(request)

    def null_for_absent(self, model: str | None) -> bool:
        """True if answers of this model have null for an absent property, because its schemas require all properties."""
        return False

    # -- answers ------------------------------------------------------------------------------------------------------

    async def stream(self, request: Request) -> AsyncGenerator[Delta | Completion, None]:
        """Like `generate`, but yields the text in pieces if the engine can; otherwise the text comes whole at the end.

        The last item is the `Completion`. The pieces before it add up to its texts, unless it holds an error. A failure
        after the first piece is not retried. Tool calls and log probabilities are in the completion only.
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

    def infer(
        self,
        conversations: Iterable[Conversation | Mapping[str, Any]],
        generation: GenerationParams | Mapping[str, Any] | None = None,
    ) -> list[Completion]:
        """Answers all conversations, at most `concurrency` at once, and returns the completions in their order.

        Takes `Conversation`s or dicts with `messages` (and optionally `id`, `generation`, `model`, `adapter`).
        An invalid or failed conversation gets a completion with `error`; the others are not affected.
        """
        base = generation if isinstance(generation, GenerationParams) else GenerationParams.parse(generation or {})
        return run_sync(self._infer(list(conversations), base))

    async def _infer(
        self, conversations: list[Conversation | Mapping[str, Any]], base: GenerationParams
    ) -> list[Completion]:
        tasks = {each.task if isinstance(each, Conversation) else each.get("task", CHAT) for each in conversations}
        slots = min(len(conversations), max((self.concurrency_for(task) for task in tasks), default=1))
        completions: list[Completion] = [Completion()] * len(conversations)
        waiting = iter(enumerate(conversations))

        async def slot() -> None:
            for at, conversation in waiting:
                try:
                    request = to_request(conversation, base)
                except EngineError as error:
                    completions[at] = Completion(error=Failure.of(error), engine=self.kind, model=self.config.model)
                else:
                    completions[at] = await self.generate(request)

        await asyncio.gather(*(slot() for _ in range(slots)))
        return completions

    # -- money --------------------------------------------------------------------------------------------------------

    def cost(self, usage: Usage, asked: str | None, answered: str | None = None, *, batch: bool = False) -> float | None:
        """US$ for the usage of a request, by the price of the model `asked` for (None: the engine's own).

        If that model has no price, the price of the model that `answered` counts. None if neither is known. A local engine
        without a price is free.
        """
        if not usage.input and not usage.output and usage.known:
            return 0.0
        if self.runs_here:  # a rate that is not set is free
            return self.config.price.of(usage.input, usage.cached_input, usage.output, usage.cache_write)
        if (asked, answered) not in self._prices:
            self._prices[asked, answered] = price_of(self.config, asked, answered)
        price = self._prices[asked, answered]
        return (price.in_batch(self.batch_share(asked)) if batch else price).cost(usage)

    def batch_share(self, model: str | None) -> float:
        """The price of this model in a provider's batch, as a share of the live price."""
        return 1.0

    @functools.cached_property
    def _prices(self) -> dict[tuple[str | None, str | None], Price]:
        return {}

    # -- the end ------------------------------------------------------------------------------------------------------

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

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Names the engines that have a batch API, in place of Python's "has no attribute 'infer_batch'"."""
            if name in ("infer_batch", "get_batch_status", "get_batch_results", "list_batches", "cancel_batch"):
                from engines.remote.batch.factory import no_batch_api

                raise no_batch_api(self.config.kind)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class ModelEngine(Engine):
    """Base of engines that ask a model. A subclass loads it in `_load` and answers one request in `_generate`.

    `generate` adds the two behaviours that all answers have, in this one place: it asks `turns` one after the other, and it
    asks again for an answer that does not match `response_format`.
    """

    def __init__(self, config: EngineConfig | None = None, /, **keys: Any) -> None:
        self.config = config if config is not None else config_from_keys(self.kind, keys)
        self._load()

    def _load(self) -> None:
        """Loads the model. Raises `ConfigError` if the configuration cannot work."""

    @abstractmethod
    async def _generate(self, request: Request) -> Completion:
        """Answers one request, or raises `EngineError`."""

    async def _evaluate(self, request: Request) -> Completion:
        """The `values` of a request whose task is not a chat. Called for the tasks in `capabilities.tasks` only.

        Raises `EngineError`.
        """
        raise NotImplementedError(f"{type(self).__name__} has tasks in its capabilities that it lacks")

    async def generate(self, request: Request) -> Completion:
        if not is_chat(request.task):
            return await self._answer(request)
        if has_media(request):
            started = time.perf_counter()
            try:
                request = await self.load_media(request)
            except EngineError as error:
                return self._finished(request, Completion(error=Failure.of(error), attempts=0), started)
        null_for_absent = self.null_for_absent(request.model)
        return await generate_turns(
            functools.partial(generate_validated, self._answer, null_for_absent=null_for_absent), request
        )

    async def load_media(self, request: Request) -> Request:
        """The request with its media as data URLs. Raises `EngineError("invalid_input")`."""
        able = self.capabilities_for(request)
        if not able.images:  # `prepared` refuses it
            return request
        return await load_media(request, self.config, fetches=not able.fetches_media, inspect=self.inspect_image)

    def load_media_sync(self, request: Request) -> Request:
        return run_sync(self.load_media(request)) if has_media(request) else request

    def inspect_image(self, data: bytes) -> None:
        """Raises `EngineError("invalid_input")` for an image that this engine must not decode. Runs in a thread."""

    async def _answer(self, request: Request) -> Completion:
        """Asks the model once; a failure becomes the completion's `error`."""
        started = time.perf_counter()
        try:
            request = self.prepared(request)
            completion = await (self._generate(request) if is_chat(request.task) else self._evaluate(request))
            if self.runs_here:  # what a server gives is checked as it is read
                check_values(completion.values)
        except EngineError as error:
            completion = Completion(error=Failure.of(error), usage=error.usage or Usage(), attempts=error.attempts)
            forget_frames(error)
        return self._finished(request, completion, started)

    def _finished(self, request: Request, completion: Completion, started: float) -> Completion:
        if not completion.latency_s:  # a remote engine measures it
            completion.latency_s = max(0.0, time.perf_counter() - started - (completion.queued_s or 0.0))
        completion.engine = self.kind
        completion.cost_usd = self.cost(completion.usage, request.model, completion.model)
        if completion.model is None:
            completion.model = request.model or self.config.model
        return completion


def run_sync(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end. If a loop already runs in this thread (a notebook), runs it in a new thread."""
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
