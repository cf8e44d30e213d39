"""The interface of every engine, local or remote: `await engine.generate(request) -> Completion`.

`Engine` is what callers see. `ModelEngine` is the base of engines that ask a model: it adds what every answer goes through.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from engines.config import Capabilities, EngineConfig, Price, config_from_keys
from engines.errors import ConfigError, EngineError, Failure, Finding
from engines.params import GenerationParams
from engines.prices import price_of
from engines.rendering import render_messages
from engines.structured import generate_validated
from engines.turns import generate_turns
from engines.types import Completion, Conversation, Delta, Request, Stream, text_of, to_request
from engines.usage import Usage

if TYPE_CHECKING:
    from engines.remote.controls import RemoteControls

T = TypeVar("T")


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
        """How many requests this engine wants in flight to be fully busy."""
        return self.config.max_concurrency or 64

    @property
    def remote(self) -> RemoteControls | None:
        """Limits, outages and draining, for engines that ask a server; None for engines that run here."""
        return None

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
        """Raises `ConfigError` if no row could be asked with these parameters."""
        lack = self.capabilities_for(Request([], generation)).lacks(generation)
        if lack and self.config.unsupported != "drop":
            raise ConfigError(
                f"{lack[1]} is not supported by engine={self.config.kind} model={self.config.model} "
                "(engine.unsupported=drop leaves it out)"
            )

    def capabilities_for(self, request: Request) -> Capabilities:
        """What the model that this request goes to can do."""
        return self.capabilities

    def prepared(self, request: Request) -> Request:
        """The request as this engine can serve it. Raises `EngineError("invalid_input")` if it cannot."""
        capabilities = self.capabilities_for(request)
        if self.config.unsupported == "drop":
            while lack := capabilities.lacks(request.generation):
                self._warn_dropped(lack[1])
                request = replace(request, generation=replace(request.generation, **{lack[0]: None}))
        if refused := capabilities.refuse(request, self.config):
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
        slots = asyncio.Semaphore(self.concurrency)

        async def one(conversation: Conversation | Mapping[str, Any]) -> Completion:
            try:
                request = to_request(conversation, base)
            except EngineError as error:
                return Completion(error=Failure.of(error), engine=self.kind, model=self.config.model)
            async with slots:
                return await self.generate(request)

        return await asyncio.gather(*(one(conversation) for conversation in conversations))

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
        cost = self._prices[asked, answered].cost(usage)
        return None if cost is None else cost * (self.batch_share(asked) if batch else 1.0)

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

    async def generate(self, request: Request) -> Completion:
        return await generate_turns(functools.partial(generate_validated, self._answer), request)

    async def _answer(self, request: Request) -> Completion:
        """Asks the model once; a failure becomes the completion's `error`."""
        started = time.perf_counter()
        try:
            completion = await self._generate(self.prepared(request))
        except EngineError as error:
            completion = Completion(error=Failure.of(error), usage=error.usage or Usage(), attempts=error.attempts)
        if not completion.latency_s:  # a remote engine measures the answer alone, without the waits before it
            completion.latency_s = time.perf_counter() - started
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
