"""The tasks other than a chat of a provider's API: bodies, and one exchange for several rows."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Coroutine, Sequence
from itertools import takewhile
from typing import Any, Protocol

from engines.config import Capabilities, EngineConfig
from engines.errors import EngineError, invalid
from engines.remote.concurrency import Endpoint
from engines.remote.errors import reported
from engines.remote.event_loops import PerLoop
from engines.remote.http_connection import Reply
from engines.remote.provider import Provider, task_url
from engines.remote.sender import RequestSender
from engines.remote.task_formats import RowAnswer, TaskFormat, format_of, task_usage
from engines.remote.task_options import TaskOptions
from engines.remote.text_batcher import RequestLimits, TextBatcher
from engines.remote.wire_format import bad_response
from engines.types import Completion, Request

# Rows of the same kind may be in one request.
Kind = tuple[Any, ...]


def kind_of(request: Request) -> Kind:
    extra = json.dumps(request.extra_body, sort_keys=True) if request.extra_body else None
    generation, of_messages = request.generation, bool(request.messages)
    # The only parameters of tasks other than a chat: see `TASKS`.
    params = generation.dimensions, generation.logprobs
    return request.task, of_messages, request.model, request.adapter, params, extra


class TaskServer(Protocol):
    """The part of a remote engine that its tasks use."""

    config: EngineConfig
    provider: Provider
    headers: dict[str, str]
    sender: RequestSender
    run_id: str

    def for_model(self, model: str | None) -> tuple[Provider, Capabilities]: ...

    def served_model(self, request: Request) -> str | None: ...

    def with_extra_body(self, body: dict[str, Any], request: Request) -> dict[str, Any]: ...

    def encode(self, body: dict[str, Any]) -> tuple[Any, int]: ...

    async def exchange(self, url: str, request: Request, headers: dict[str, str], content: Any) -> Reply: ...

    def json_object(self, reply: Reply) -> dict[str, Any]: ...

    def cleaned(self, error: EngineError) -> EngineError: ...


class TaskRequests:
    """Evaluates the rows of one engine. It may be used from several threads and event loops."""

    def __init__(self, server: TaskServer) -> None:
        self.server = server
        self.formats: dict[tuple[str, bool, str | None], tuple[TaskFormat, TaskOptions]] = {}
        self.limits: dict[Kind, RequestLimits] = {}
        self.batchers: PerLoop[dict[Kind, TextBatcher]] = PerLoop(dict)

    def evaluate(self, request: Request) -> Coroutine[Any, Any, Completion]:
        """The values of one row. Raises `EngineError`."""
        kind = kind_of(request)
        batchers = self.batchers.get()
        batcher = batchers.get(kind)
        if batcher is None:
            limits = self.limits.setdefault(kind, RequestLimits(self._format(request)[1]))
            batcher = batchers[kind] = TextBatcher(self._send, limits)
        return batcher.evaluate(request)

    def body(self, requests: Sequence[Request]) -> dict[str, Any]:
        """The JSON that is sent for rows of one kind. Raises `EngineError("invalid_input")`."""
        task_format, options = self._format(requests[0])
        body = {"model": self.server.served_model(requests[0]), **task_format.body(requests, options)}
        return self.server.with_extra_body(body, requests[0])

    def url(self, url: str, request: Request) -> str:
        """The URL to which a row is sent, by the URL of the chats."""
        task_format, options = self._format(request)
        return task_url(url, self.server.provider.wire, options.path or task_format.path)

    def read(self, payload: dict[str, Any], requests: Sequence[Request]) -> tuple[Completion, Sequence[RowAnswer]]:
        """The completion of a whole answer, and the answer of each row. Raises `EngineError` with the usage."""
        task_format, options = self._format(requests[0])
        usage = task_usage(payload)
        try:
            if payload.get("error"):
                raise reported(payload, 200, {})
            answers = task_format.read(payload, requests, options)
        except EngineError as error:
            error.usage = usage
            raise self.server.cleaned(error) from None
        model = payload.get("model")
        return Completion(usage=usage, model=model if isinstance(model, str) else None), answers

    def read_one(self, payload: dict[str, Any], request: Request) -> Completion:
        """The completion in the answer to a request with one row. Raises `EngineError` with the usage."""
        completion, [values] = self.read(payload, [request])
        if isinstance(values, EngineError):
            values.usage = completion.usage
            raise self.server.cleaned(values)
        completion.values = values
        return completion

    def _format(self, request: Request) -> tuple[TaskFormat, TaskOptions]:
        """Raises `EngineError("invalid_input")` if the provider's API does not take the row's kind of input."""
        kind = request.task, bool(request.messages), request.model
        if kind not in self.formats:
            options = self.server.for_model(request.model)[0].task_options(request.task)
            try:
                self.formats[kind] = format_of(request, options, self.server.config.kind), options
            except EngineError as error:
                error.attempts = 0
                raise
        return self.formats[kind]

    async def _send(self, requests: Sequence[Request], sent: Callable[[], None]) -> tuple[Completion, Sequence[RowAnswer]]:
        """One request for several rows (see `Send`)."""
        server, request = self.server, requests[0]
        task_format, body = self._format(request)[0], self.body(requests)
        content, size = server.encode(body)
        headers = server.headers
        if server.provider.idempotency_header:
            headers = {**headers, server.provider.idempotency_header: f"{server.run_id}-{uuid.uuid4().hex}"}
        wire = server.provider.wire
        answers: Sequence[RowAnswer] = []

        async def ask(endpoint: Endpoint) -> Completion:
            nonlocal answers
            sent()
            url, added = self.url(endpoint.url, request), {}
            if task_format.tokenized:
                tokens, start = await self._answer_tokens(task_url(endpoint.url, wire, "../tokenize"), request, body)
                rest = {name: value for name, value in body.items() if name != "messages"}
                reply = await server.exchange(url, request, headers, server.encode({**rest, "prompt": tokens})[0])
                added = {"answer": (start, len(tokens))}
            else:
                reply = await server.exchange(url, request, headers, content)
            completion, answers = self.read({**server.json_object(reply), **added}, requests)
            return completion

        model = request.model or server.config.model or ""
        return await server.sender.send(requests, model, size, ask, output=0.0), answers

    async def _answer_tokens(self, url: str, request: Request, body: dict[str, Any]) -> tuple[list[int], int]:
        """The tokens of a conversation that ends with an answer, and the place where those of the answer begin.

        They begin at the first token that differs from the prompt without the answer. Raises `EngineError`.
        """
        found = []
        messages = body["messages"]
        for given in (
            {"messages": messages, "add_generation_prompt": False, "continue_final_message": True},
            {"messages": messages[:-1], "add_generation_prompt": True},
        ):
            content = self.server.encode({"model": body["model"], **given})[0]
            payload = self.server.json_object(await self.server.exchange(url, request, self.server.headers, content))
            tokens = payload.get("tokens")
            if not isinstance(tokens, list):
                raise self.server.cleaned(bad_response("the answer has no tokens", payload))
            found.append(tokens)
        whole, prompt = found
        start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, prompt, strict=False)))
        if start == len(whole):
            raise invalid("the last answer is empty: it has no token of its own")
        return whole, start
