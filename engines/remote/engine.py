"""The engine of every provider with an HTTP API: bodies, headers, and one exchange with a server.

`RequestSender` decides when a request is sent, and sends it again. One engine may be used from several threads, each with
an event loop of its own: limits, slots and endpoints are shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import uuid
from collections.abc import Coroutine
from typing import Any, ClassVar

import httpx
import orjson

from engines.base import ModelEngine
from engines.config import Capabilities, EngineConfig, config_from_keys
from engines.errors import ConfigError, EngineError, Finding, invalid, unknown_kwarg
from engines.media import in_thread_with_media
from engines.remote import anthropic_messages, openai_chat
from engines.remote.auth import Auth
from engines.remote.batch.api import Batches
from engines.remote.concurrency import Endpoint, EndpointPool
from engines.remote.controls import RemoteControls
from engines.remote.errors import broken, failure, observed, reported
from engines.remote.http import Transport
from engines.remote.http_connection import Feed, Reply
from engines.remote.preflight import findings, masked, without_secrets
from engines.remote.provider import Provider, endpoints, merge
from engines.remote.schemas import SUBSETS
from engines.remote.sender import RequestSender
from engines.remote.sse import SSEParser
from engines.remote.task_requests import TaskRequests
from engines.remote.wire_format import WireFormat, bad_response, read_answer
from engines.rendering import render_http
from engines.tasks import is_chat
from engines.types import Completion, Request
from engines.usage import Usage

# The wire formats that are sent over HTTP. `BedrockEngine` sends `converse` through boto3.
WIRE_FORMATS: dict[str, WireFormat] = {"chat": openai_chat, "messages": anthropic_messages}

# The most rows in flight. With 2,048 texts a request, these are eight full requests.
MOST_ROWS = 16_384


class RemoteEngine(Batches, ModelEngine):
    """A provider's API. `config.provider` says how it differs from other providers with the same wire format."""

    kind = "openai_compatible"
    runs_here = False
    sender_class: ClassVar[type[RequestSender]] = RequestSender

    def _load(self) -> None:
        config = self.config
        self.kind = config.kind  # type: ignore[misc]
        self.provider = Provider.of(config)
        self.models: dict[str | None, tuple[Provider, Capabilities]] = {}
        self.run_id = secrets.token_hex(4)
        if config.model is None:
            raise ConfigError(
                f"engine={config.kind} needs engine.model: the provider's name of a model", key="engine.model"
            )
        for name in config.kwargs:
            if name not in self.provider.kwargs:
                hint = "engine.extra_body adds fields to the requests"
                raise unknown_kwarg(name, config.kind, self.provider.kwargs, hint)
        self._connect()
        self.sender = self.sender_class(config, self.endpoints, self.max_concurrency, self.cost)
        self.tasks = TaskRequests(self)

    def _connect(self) -> None:
        config = self.config
        if self.provider.wire not in WIRE_FORMATS:
            raise ConfigError(
                f"engine.provider.wire={self.provider.wire} is for engine=bedrock only; "
                f"engine={config.kind} can use {' or '.join(WIRE_FORMATS)}",
                key="engine.provider",
            )
        self.wire_format = WIRE_FORMATS[self.provider.wire]
        self.endpoints = EndpointPool(endpoints(config, self.provider))  # first: a service that ended needs no key
        self.auth = Auth.of(config, self.provider)
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

    def concurrency_for(self, task: str) -> int:
        """Enough rows for full requests."""
        texts = self.provider.task_options(task).texts if task in self.provider.tasks else 1
        return max(self.concurrency, min(MOST_ROWS, self.concurrency * texts))

    def for_model(self, model: str | None) -> tuple[Provider, Capabilities]:
        model = model or self.config.model
        if model not in self.models:
            provider = self.provider.for_model(model)
            if not self.config.prompt_caching:
                provider = dataclasses.replace(provider, prompt_caching=False)
            able = dataclasses.replace(provider.capabilities(), extra_body=self.wire_format.ROW_FIELDS)
            self.models[model] = provider, able
        return self.models[model]

    @classmethod
    def class_capabilities(cls, model: str | None) -> Capabilities:
        return Provider.of(config_from_keys(cls.kind, {})).for_model(model).capabilities()

    def capabilities_for(self, request: Request) -> Capabilities:
        return self.for_model(request.model)[1]

    def null_for_absent(self, model: str | None) -> bool:
        subset = SUBSETS.get(self.for_model(model)[0].schemas or "")
        return subset is not None and subset.all_required

    @property
    def remote(self) -> RemoteControls:
        return self.sender

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
        url = self.endpoints.urls[0] if is_chat(request.task) else self.tasks.url(self.endpoints.urls[0], request)
        headers = {name: masked(name, value) for name, value in {**self.headers, **self.auth.fixed}.items()}
        if self.provider.idempotency_header:
            headers[self.provider.idempotency_header] = f"{self.run_id}-{request.key}"
        return render_http(url, headers, self.body(self.prepared(request)))

    # -- one request --------------------------------------------------------------------------------------------------

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON that is sent for a request. Raises `EngineError("invalid_input")`."""
        if not is_chat(request.task):
            return self.tasks.body([request])
        if request.turns:  # `generate` sends one request for each turn; only a batch comes here with all of them
            raise invalid("a row's turns are asked one after the other, which no batch API can do (run.mode=live does)")
        provider, _ = self.for_model(request.model)
        if provider.defaults:
            given = request.generation.given()
            absent = {name: value for name, value in provider.defaults.items() if name not in given}
            request = dataclasses.replace(request, generation=request.generation.override(absent))
        body: dict[str, Any] = self.wire_format.body(request, self.served_model(request), provider)
        return self.with_extra_body(body, request)

    def served_model(self, request: Request) -> str | None:
        """The name of the model, or of the adapter, that the server knows."""
        provider, model = self.for_model(request.model)[0], request.model or self.config.model
        if provider.adapter_model and (adapter := request.adapter or self.config.adapter):
            return provider.adapter_model.format(adapter=adapter, model=model)
        return model

    def with_extra_body(self, body: dict[str, Any], request: Request) -> dict[str, Any]:
        merge(body, self.config.extra_body)
        taken = self.wire_format.ROW_FIELDS
        merge(body, {name: value for name, value in request.extra_body.items() if taken is None or name in taken})
        return body

    def encode(self, body: dict[str, Any]) -> tuple[Any, int]:
        """The bytes that are sent, and their number. Whole numbers of any size are kept."""
        try:
            content = orjson.dumps(body)
        except TypeError:
            content = json.dumps(body, ensure_ascii=False).encode()
        return content, len(content)

    def _streams(self, request: Request) -> bool:
        """True if the answer comes as a stream: the caller wants one, or the API gives long answers in no other way."""
        most = self.for_model(request.model)[0].stream_above
        return request.stream is not None or (most is not None and (request.generation.max_tokens or 0) > most)

    def _content(self, request: Request) -> tuple[Any, int]:
        streams = self.wire_format.STREAM if self._streams(request) else {}
        return self.encode({**streams, **self.body(request)})

    async def _generate(self, request: Request) -> Completion:
        try:
            content, size = await in_thread_with_media(self._content, request)
        except EngineError as error:
            error.attempts = 0
            raise
        headers = self.headers
        if self.provider.idempotency_header:  # differs in every run, or a failure of an earlier run would be replayed
            headers = {**headers, self.provider.idempotency_header: f"{self.run_id}-{request.key or uuid.uuid4().hex}"}
        model = request.model or self.config.model or ""
        return await self.sender.send(
            [request], model, size, lambda endpoint: self._ask(endpoint, request, headers, content)
        )

    async def _ask(self, endpoint: Endpoint, request: Request, headers: dict[str, str], content: Any) -> Completion:
        """Sends and reads. Raises `EngineError`."""
        accumulator = self.wire_format.accumulator() if self._streams(request) else None
        parser = SSEParser(accumulator, request.stream) if accumulator else None
        reply = await self.exchange(endpoint.url, request, headers, content, parser.feed if parser else None)
        payload: Any = None
        if parser is not None and parser.fed:
            try:
                payload = parser.payload()
            except EngineError as error:
                raise self.cleaned(error) from None
        else:
            payload = self.json_object(reply)
        inner = payload.get("error")
        if inner and not payload.get("choices"):  # some providers report errors with status 200
            broken_off = reported(payload, reply.status, reply.headers)
            if payload.get("usage") or (parser is not None and parser.broken_off):
                broken_off.usage = self.wire_format.usage(payload)
            raise self.cleaned(broken_off)
        return self.read(payload, request.generation.n, request.model)

    async def exchange(
        self, url: str, request: Request, headers: dict[str, str], content: Any, feed: Feed | None = None
    ) -> Reply:
        """Sends a body and reads an answer of status 2xx. Raises `EngineError`."""
        try:
            sent = {**headers, **await self.auth.headers()}
            reply = await self.transport.send("POST", url, sent, content, feed)
        except httpx.HTTPError as error:
            lost = self.cleaned(broken(error))
            connected = not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
            if connected and lost.type != "bad_request":  # an answer may have been under way
                lost.usage = Usage(known=False)
            raise lost from None
        except EngineError as error:  # an event that cannot be parsed
            raise self.cleaned(error) from None
        if (seen_limits := observed(reply.headers)) is not None:
            self.sender.limits.observe(request.model or self.config.model or "", seen_limits.pause_s, seen_limits.limits)
        if not 200 <= reply.status < 300:
            refused = failure(reply.status, bytes(reply.content), reply.headers)
            if reply.status == 401 and self.auth.refused():
                refused.retryable = True
            raise self.cleaned(refused)
        return reply

    def json_object(self, reply: Reply) -> dict[str, Any]:
        """The JSON object in an answer. Raises `EngineError`."""
        payload: Any = None
        with contextlib.suppress(ValueError):
            payload = orjson.loads(reply.content)
        if not isinstance(payload, dict):
            raise self.cleaned(bad_response("the answer is not a JSON object", bytes(reply.content[:200])))
        return payload

    def read_batched(self, answer: dict[str, Any] | EngineError, request: Request) -> Completion:
        """The completion in one result of a batch. Raises `EngineError`, or the one that is given as the result."""
        if isinstance(answer, EngineError):
            raise self.cleaned(answer)
        if not is_chat(request.task):
            return self.tasks.read_one(answer, request)
        return self.read(answer, request.generation.n, request.model)

    def read(self, answer: dict[str, Any], n: int | None = None, model: str | None = None) -> Completion:
        """The completion in the body of an answer of `model` (None: the engine's own) with `n` choices.

        Raises `EngineError` for a bad answer.
        """
        try:
            completion = read_answer(self.wire_format, answer, self.for_model(model)[0], n)
        except EngineError as error:
            raise self.cleaned(error) from None
        return completion

    def _evaluate(self, request: Request) -> Coroutine[Any, Any, Completion]:
        return self.tasks.evaluate(request)

    def batch_share(self, model: str | None) -> float:
        return self.provider.batch_share(model or self.config.model)

    def cleaned(self, error: EngineError) -> EngineError:
        error.args = (self.auth.clean(str(error)),)
        return error
