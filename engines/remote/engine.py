"""The engine of every provider with an HTTP API.

A request takes a slot, an endpoint and its share of the rate limits for each try; retries are a loop around that. One
engine may be used from several threads, each with an event loop of its own: limits, slots and endpoints are shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import secrets
import threading
import time
import uuid
from typing import Any

import httpx
import orjson

from engines.base import ModelEngine
from engines.config import Capabilities, EngineConfig, SourceOf
from engines.errors import ConfigError, EngineError, Finding, invalid, unknown_kwarg
from engines.remote import anthropic_messages, openai_chat
from engines.remote.auth import Auth
from engines.remote.batch.api import Batches
from engines.remote.concurrency import AdaptiveSemaphore, Endpoint, EndpointPool, RetryBudget
from engines.remote.controls import CheckBudget, RemoteControls
from engines.remote.errors import OVERLOAD, broken, failure, observed
from engines.remote.event_loops import PerLoop
from engines.remote.http import Transport
from engines.remote.preflight import findings, masked, without_secrets
from engines.remote.provider import Provider, endpoints, merge
from engines.remote.rate_limits import Limits
from engines.remote.sse import SSEParser
from engines.remote.wire import Wire, bad_response, check_choices
from engines.rendering import render_http
from engines.types import BYTES_PER_TOKEN, FIRST_OUTPUT, Completion, Request
from engines.usage import Usage

WIRES: dict[str, Wire] = {"chat": openai_chat, "messages": anthropic_messages}

# Full jitter: each wait is drawn between 0 and a bound that doubles with every try.
BACKOFF_FIRST_S, BACKOFF_MOST_S = 0.5, 60.0
# The longest that one answer's Retry-After stops all other rows; its own row waits as long as it says.
MOST_PAUSE_S = 60.0


class RemoteEngine(Batches, ModelEngine):
    """A provider's API. `config.provider` says how it differs from other providers with the same wire format."""

    kind = "openai_compatible"
    runs_here = False

    def _load(self) -> None:
        config = self.config
        self.kind = config.kind  # type: ignore[misc]
        self.provider = Provider.of(config)
        self.models: dict[str | None, tuple[Provider, Capabilities]] = {}
        self.limits = Limits(config)
        self.semaphore = AdaptiveSemaphore(self.max_concurrency)
        self.retries = RetryBudget()
        self.check_budget: CheckBudget | None = None
        self.max_outage_s = 900.0  # how long no server may answer
        self.outage: str | None = None
        self.stopping = False
        self.stops: PerLoop[asyncio.Event] = PerLoop(asyncio.Event)
        self.counts: dict[str, float] = {"retried": 0, "throttled": 0, "limiter_wait_seconds": 0.0}
        self.counting = threading.Lock()
        self.run_id = secrets.token_hex(4)
        # Estimates for the next request's reservation. Threads may overwrite each other's updates: that does no harm.
        self.bytes_per_token, self.mean_output = BYTES_PER_TOKEN, FIRST_OUTPUT
        if config.model is None:
            raise ConfigError(
                f"engine={config.kind} needs engine.model: the provider's name of a model", key="engine.model"
            )
        for name in config.kwargs:
            if name not in self.provider.kwargs:
                hint = "engine.extra_body adds fields to the requests"
                raise unknown_kwarg(name, config.kind, self.provider.kwargs, hint)
        self._connect()

    def _connect(self) -> None:
        config = self.config
        self.wire = WIRES[self.provider.wire]
        self.auth = Auth.of(config, self.provider)
        self.endpoints = EndpointPool(endpoints(config, self.provider))
        self.headers = {"content-type": "application/json", **self.provider.headers, **config.headers}
        self.transport = Transport(
            timeout_s=config.timeout_s,
            connect_timeout_s=min(config.connect_timeout_s, config.timeout_s),
            read_timeout_s=config.read_timeout_s,
        )
        self.transport.check(self.endpoints.urls[0], {**self.headers, **self.auth.fixed})

    @property
    def max_concurrency(self) -> int:
        """The largest number of requests in flight."""
        return self.config.max_concurrency or 64

    @property
    def concurrency(self) -> int:
        # Twice: rows that wait for a retry or for a limit hold no slot.
        return 2 * self.max_concurrency

    def for_model(self, model: str | None) -> tuple[Provider, Capabilities]:
        model = model or self.config.model
        if model not in self.models:
            provider = self.provider.for_model(model)
            if not self.config.prompt_caching:
                provider = dataclasses.replace(provider, prompt_caching=False)
            self.models[model] = provider, provider.capabilities()
        return self.models[model]

    def capabilities_for(self, request: Request) -> Capabilities:
        return self.for_model(request.model)[1]

    # -- what the pipeline asks and sets: `RemoteControls` ------------------------------------------------------------

    @property
    def remote(self) -> RemoteControls:
        return self

    @property
    def admitted(self) -> float:
        return self.semaphore.limit

    @property
    def stall_reason(self) -> str:
        failing = next((endpoint for endpoint in self.endpoints.all if endpoint.open), None)
        return failing.last_error if failing and self.endpoints.down_s else ""

    def attach(self, source_of: SourceOf, max_outage_s: float) -> None:
        self.limits.source = source_of(self.config)
        self.max_outage_s = max_outage_s

    def set_budget(self, check: CheckBudget) -> None:
        self.check_budget = check

    def drain(self) -> None:
        self.stopping = True
        self.stops.call(asyncio.Event.set)
        self.limits.fail_waiting(cancelled)

    def _count(self, name: str, amount: float = 1) -> None:
        with self.counting:
            self.counts[name] += amount

    def close(self) -> None:
        if hasattr(self, "transport"):
            self.transport.close()

    # -- before a request ---------------------------------------------------------------------------------------------

    @classmethod
    def preflight(cls, config: EngineConfig, thorough: bool) -> list[Finding]:
        return findings(config)

    @classmethod
    def unloaded(cls, config: EngineConfig) -> RemoteEngine:
        return cls(without_secrets(config))

    def check_request(self, request: Request) -> None:
        self.body(self.prepared(request))

    def render_request(self, request: Request) -> str:
        headers = {name: masked(name, value) for name, value in {**self.headers, **self.auth.fixed}.items()}
        if self.provider.idempotency_header:
            headers[self.provider.idempotency_header] = f"{self.run_id}-{request.key}"
        return render_http(self.endpoints.urls[0], headers, self.body(self.prepared(request)))

    # -- one request --------------------------------------------------------------------------------------------------

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON that is sent for a request. Raises `EngineError("invalid_input")`."""
        if request.turns:  # `generate` sends one request for each turn; only a batch comes here with all of them
            raise invalid("a row's turns are asked one after the other, which no batch API can do (run.mode=live does)")
        provider, _ = self.for_model(request.model)
        if provider.defaults:
            given = request.generation.given()
            absent = {name: value for name, value in provider.defaults.items() if name not in given}
            request = dataclasses.replace(request, generation=request.generation.override(absent))
        model = request.model or self.config.model
        if provider.adapter_model and (adapter := request.adapter or self.config.adapter):
            model = provider.adapter_model.format(adapter=adapter, model=model)
        body: dict[str, Any] = self.wire.body(request, model, provider)
        if self.config.extra_body:
            merge(body, self.config.extra_body)
        return body

    def encode(self, body: dict[str, Any]) -> tuple[Any, int]:
        """What is sent, and its size in bytes. Whole numbers of any size are kept."""
        try:
            content = orjson.dumps(body)
        except TypeError:
            content = json.dumps(body, ensure_ascii=False).encode()
        return content, len(content)

    async def _generate(self, request: Request) -> Completion:
        streams = self.wire.STREAM if request.stream is not None else {}
        try:
            content, size = self.encode({**streams, **self.body(request)})
        except EngineError as error:
            error.attempts = 0
            raise
        model = request.model or self.config.model or ""
        cost = size / self.bytes_per_token, float(request.generation.max_tokens or self.mean_output)
        headers = self.headers
        if self.provider.idempotency_header:  # differs in every run, or a failure of an earlier run would be replayed
            headers = {**headers, self.provider.idempotency_header: f"{self.run_id}-{request.key or uuid.uuid4().hex}"}
        began, tries, counted, failed = time.monotonic(), 0, 0, Usage()
        while True:
            tries += 1
            try:
                completion = await self._try(request, model, headers, content, cost)
                completion.attempts = tries
                completion.usage.add(failed)
                return completion
            except EngineError as error:
                tries -= error.type == "cancelled"  # it was not sent
                await self._raise_if_final(request, error, tries, failed)
                # A row's tries count only while the server answers others. A rate limit is not the row's fault, but a row
                # that alone is refused for so long must come to an end as well.
                counted += not self.endpoints.down_s and error.type != "rate_limit"
                if counted > self.config.max_retries or time.monotonic() - began > 2 * self.max_outage_s:
                    raise
                self._count("retried")
                wait = random.uniform(0, min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2 ** min(tries, 16)))
                if await self._stops_within(max(wait + self.retries.wait_s(), error.retry_after or 0.0)):
                    back = cancelled()
                    back.attempts, back.usage = tries, failed
                    raise back from None

    async def _raise_if_final(self, request: Request, error: EngineError, tries: int, failed: Usage) -> None:
        """Raises `error` if the request must not be tried again, whatever the number of tries.

        `failed` is the usage of all failed tries; the usage of this one is added to it.
        """
        affordable = True
        if error.usage is None and error.type in ("timeout", "bad_response"):
            error.usage = Usage(known=False)
        if error.usage is not None:
            failed.add(error.usage)
            if self.check_budget is not None:
                affordable = await self.check_budget(request, self.cost(error.usage, request.model))
        error.attempts, error.usage = tries, failed
        if not error.retryable or (request.stream is not None and request.stream.begun):
            raise error
        if not affordable:
            text = f"run.budget_usd leaves no room for another try ({error})"
            spent = EngineError("budget", text, retryable=True)
            spent.attempts, spent.usage = tries, failed
            raise spent from None
        down = self.endpoints.down_s
        if down > self.max_outage_s:
            self.outage = f"engine={self.kind} has not answered for {down:.0f} s ({error})"
            raise error

    async def _stops_within(self, seconds: float) -> bool:
        """Waits without a slot. Returns True as soon as the run ends: the row then goes back."""
        stop = self.stops.get()
        if not self.stopping:
            try:
                await asyncio.wait_for(stop.wait(), seconds)
            except TimeoutError:
                return False
        return True

    async def _try(
        self, request: Request, model: str, headers: dict[str, str], content: Any, cost: tuple[float, float]
    ) -> Completion:
        """One try, in a slot. Raises `EngineError`."""
        endpoint = await self._admitted()
        sent = time.monotonic()
        try:
            if not self.stopping:
                await self.limits.take(model, cost)
                self._count("limiter_wait_seconds", time.monotonic() - sent)
            if self.stopping:
                raise cancelled()
            sent = time.monotonic()
            completion = await self._ask(endpoint, request, headers, content)
        except EngineError as error:
            self._failed(endpoint, model, error, sent)
            if error.type not in ("timeout", "connection", "cancelled"):  # for those, the usage is not known
                self.limits.settle(model, *cost)
            raise
        except asyncio.CancelledError:
            endpoint.probing = False
            raise
        finally:
            self.endpoints.release(endpoint)
            self.semaphore.release()
        completion.latency_s = time.monotonic() - sent
        self.endpoints.answered(endpoint)
        self.semaphore.answered()
        self.retries.answered()
        if self.limits.counts_tokens and (used := completion.usage).input:
            self.limits.settle(model, cost[0] - used.input, cost[1] - used.output)
            self.bytes_per_token += 0.05 * (cost[0] * self.bytes_per_token / used.input - self.bytes_per_token)
            self.mean_output += 0.05 * (used.output - self.mean_output)
        return completion

    async def _admitted(self) -> Endpoint:
        """Waits for a slot and an endpoint. Holds no slot while no endpoint takes requests."""
        while True:
            await self.semaphore.take()
            endpoint = self.endpoints.pick()
            if endpoint is not None:
                return endpoint
            self.semaphore.release()
            if self.stopping:
                raise cancelled()
            if self.endpoints.down_s > self.max_outage_s:
                raise EngineError("connection", self.endpoints.all[0].last_error, retryable=True)
            await self.endpoints.wait()

    def _failed(self, endpoint: Endpoint, model: str, error: EngineError, sent: float) -> None:
        if error.type == "cancelled":
            endpoint.probing = False
            return
        if error.status in OVERLOAD:
            self._count("throttled")
            self.semaphore.overloaded(sent)
            if error.retry_after:
                self.limits.observe(model, min(error.retry_after, MOST_PAUSE_S), {})
        # An answer with its usage comes from a server that works: a broken one counts against its row only.
        if error.retryable and not (error.usage is not None and error.usage.known):
            self.endpoints.failed(endpoint, str(error), error.retry_after)
        else:  # the server works; it refuses this row
            self.endpoints.answered(endpoint)
            self.retries.answered()

    async def _ask(self, endpoint: Endpoint, request: Request, headers: dict[str, str], content: Any) -> Completion:
        """Sends and reads. Raises `EngineError`."""
        accumulator = self.wire.accumulator() if request.stream is not None else None
        parser = SSEParser(accumulator, request.stream) if accumulator and request.stream is not None else None
        try:
            sent = {**headers, **await self.auth.headers()}
            reply = await self.transport.send("POST", endpoint.url, sent, content, parser.feed if parser else None)
        except httpx.HTTPError as error:
            lost = self._clean(broken(error))
            connected = not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
            if connected and lost.type != "bad_request":  # an answer may have been under way
                lost.usage = Usage(known=False)
            raise lost from None
        except EngineError as error:  # an event that cannot be parsed
            raise self._clean(error) from None
        if (seen_limits := observed(reply.headers)) is not None:
            self.limits.observe(request.model or self.config.model or "", seen_limits.pause_s, seen_limits.limits)
        if not 200 <= reply.status < 300:
            refused = failure(reply.status, reply.content, reply.headers)
            if reply.status == 401 and self.auth.refused():
                refused.retryable = True
            raise self._clean(refused)
        payload: Any = None
        if parser is not None and parser.fed:
            try:
                payload = parser.payload()
            except EngineError as error:
                raise self._clean(error) from None
        else:
            with contextlib.suppress(ValueError):
                payload = orjson.loads(reply.content)
        if not isinstance(payload, dict):
            raise self._clean(bad_response("the answer is not a JSON object", reply.content[:200]))
        inner = payload.get("error")
        if inner and not payload.get("choices"):  # some providers report errors with status 200
            code = inner.get("code") if isinstance(inner, dict) else None
            code = code if isinstance(code, int) and code >= 400 else 502
            broken_off = failure(code, orjson.dumps(payload), reply.headers)
            if payload.get("usage"):
                broken_off.usage = self.wire.usage(payload)
            raise self._clean(broken_off)
        return self.read(payload, request.generation.n, request.model)

    def read(self, answer: dict[str, Any] | EngineError, n: int | None = None, model: str | None = None) -> Completion:
        """The completion in the body of an answer of `model` (None: the engine's own) with `n` choices.

        Raises `EngineError` for a bad answer, or the error that is given as the answer.
        """
        if isinstance(answer, EngineError):
            raise self._clean(answer)
        try:
            completion = check_choices(self.wire.completion(answer, self.for_model(model)[0]), n)
        except EngineError as error:
            raise self._clean(error) from None
        return completion

    def batch_share(self, model: str | None) -> float:
        return self.provider.batch_share(model or self.config.model)

    def _clean(self, error: EngineError) -> EngineError:
        error.args = (self.auth.clean(str(error)),)
        return error


def cancelled() -> EngineError:
    """The error of a row that goes back unanswered because the run ends."""
    return EngineError("cancelled", "the run ended before this row was answered")
