"""The one interface of every engine, local or remote: `await engine.generate(request) -> Completion`."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self, TypeVar

from engines.config import Capabilities, EngineConfig, Price, SourceOf, config_from_keys
from engines.errors import ConfigError, EngineError, Failure
from engines.params import GenerationParams
from engines.prices import price_of
from engines.remote.batch.api import Batches
from engines.structured import generate_validated
from engines.turns import generate_turns
from engines.types import Completion, Conversation, Delta, Request, Stream, text_of, to_request
from engines.usage import Usage

T = TypeVar("T")


class Engine(Batches, ABC):
    """Base class. A subclass loads its model in `_load` and answers in `_generate`; both may raise our errors only.

    `generate` may be awaited from any number of tasks at once: engines batch by themselves.
    """

    kind: ClassVar[str]
    capabilities: ClassVar[Capabilities] = Capabilities()
    max_outage_s: float = 900.0  # how long a remote engine's server may be silent
    # Told that a try failed which may have to be paid, and its cost in US$ (None: not known); whether there is money for
    # another one.
    check_budget: Callable[[Request, float | None], Awaitable[bool]] | None = None
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
    def stall_reason(self) -> str:
        """Why nothing goes on at the moment; empty where something does."""
        return ""

    async def generate(self, request: Request) -> Completion:
        """Answers one request; what goes wrong with it is in the completion's `error`. Other exceptions are bugs.

        An answer that is not in the shape asked for is asked for again; `turns` are asked one after the other.
        """
        return await generate_turns(functools.partial(generate_validated, self._answer), request)

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
