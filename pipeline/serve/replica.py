"""A replica of `eagleray serve`: one engine behind the APIs of OpenAI and vLLM for chats and other tasks."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from engines.config import EngineConfig
from engines.errors import ConfigError, EngineError, Failure, invalid
from engines.params import GenerationParams
from engines.registry import load_engine
from engines.types import Completion, Delta
from pipeline.config import ServeConfig
from pipeline.executors.live.rate_limiter import NAMESPACE, reserve_through_ray
from pipeline.executors.live.secrets import Secrets, settle_environment
from pipeline.serve.errors import error_body, status_of
from pipeline.serve.openai_api import ChatRequest, Chunks, event, parse_chat_request, whole
from pipeline.serve.request_body import read_body
from pipeline.serve.task_api import ROUTES, first_failure, parse_task_call, task_response
from pipeline.storage.exact_json import dumps, loads

logger = logging.getLogger(__name__)

# Error types whose messages a client does not get, because they name the server behind this one or quote its API key; and
# the text that the client gets instead.
_HIDDEN = {
    "auth": "the provider behind this endpoint refused the endpoint's API key",
    "connection": "the server behind this endpoint cannot be reached",
}


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    engine: EngineConfig
    generation: GenerationParams
    serve: ServeConfig
    max_outage_s: float
    cpus: float
    broker: str  # the name of the `SecretsBroker`


class SecretsBroker:
    """An actor that gives replicas their secrets, which must not be in Ray's metadata. Replicas report to it that their
    engine has loaded, or why it cannot be loaded."""

    def __init__(self) -> None:
        self.secrets = Secrets({})
        self.concurrency: int | None = None
        self.refusal: ConfigError | None = None

    def open(self, secrets: Secrets) -> None:
        self.secrets = secrets

    def take(self) -> Secrets:
        return self.secrets

    def loaded(self, concurrency: int) -> None:
        self.concurrency = concurrency

    def refuse(self, error: ConfigError) -> None:
        self.refusal = error

    def news(self) -> tuple[int | None, ConfigError | None]:
        """The concurrency of an engine, and the error with which loading failed. None if not known yet."""
        return self.concurrency, self.refusal


class ServeReplica:
    """One engine with the HTTP API in front of it."""

    def __init__(self, config: ReplicaConfig) -> None:
        import ray

        broker = ray.get_actor(config.broker, namespace=NAMESPACE)
        secrets: Secrets = ray.get(broker.take.remote())
        settle_environment(secrets, config.cpus)
        self.config = config
        self.key = secrets.values[config.serve.api_key_env].strip() if config.serve.api_key_env else None
        self.served = config.engine.model or config.engine.kind
        self.broken: str | None = None
        try:
            self.engine = load_engine(config.engine)
            self.engine.check(config.generation)
        except ConfigError as error:
            ray.get(broker.refuse.remote(error))
            raise
        if self.engine.remote is not None:
            self.engine.remote.attach(reserve_through_ray, config.max_outage_s)
        ray.get(broker.loaded.remote(self.engine.concurrency))

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces the replica if this raises."""
        if self.broken is not None:
            raise RuntimeError(self.broken)

    def __del__(self) -> None:
        if engine := self.__dict__.pop("engine", None):
            engine.close()

    async def __call__(self, http: HttpRequest) -> Response:
        try:
            return await self._respond(http)
        except EngineError as error:
            return self._failed(Failure.of(error))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception:  # a bug, ours or of a library, fails only this request
            return self._failed(_bug())

    async def _respond(self, http: HttpRequest) -> Response:
        path = http.url.path.rstrip("/")
        if path == "/health":
            if self.broken is not None:
                raise EngineError("engine_crash", self.broken)
            return _json({"status": "ok"})
        self._admit(http.headers.get("authorization", ""))
        if path == "/v1/chat/completions" or path in ROUTES:
            if http.method != "POST":
                raise EngineError("bad_request", f"{path} takes POST", status=405)
            body = _parsed(await read_body(http, self.config.serve))
            return await (self._task(path, body) if path in ROUTES else self._chat(body))
        model = {"id": self.served, "object": "model", "created": 0, "owned_by": "eagleray"}
        if path == "/v1/models":
            return _json({"object": "list", "data": [model]})
        if path == f"/v1/models/{self.served}":
            return _json(model)
        raise EngineError("not_found", f"there is nothing at {path:.200}", status=404)

    def _admit(self, authorization: str) -> None:
        scheme, _, given = authorization.partition(" ")
        right = hmac.compare_digest(given.strip().encode(), (self.key or "").encode()) and scheme.lower() == "bearer"
        if self.key is not None and not right:
            raise EngineError("auth", "this endpoint needs its API key: authorization: Bearer …", status=401)

    async def _task(self, path: str, body: Any) -> Response:
        call = parse_task_call(path, body, self.served, self.config.generation, self.config.serve)
        completions = await asyncio.gather(*map(self.engine.generate, call.requests))
        failure = first_failure(completions)
        return self._failed(_for_client(failure)) if failure else _json(task_response(call, completions))

    async def _chat(self, body: Any) -> Response:
        chat = parse_chat_request(body, self.served, self.config.generation, self.config.serve)
        if not chat.stream:
            completion = await self.engine.generate(chat.request)
            return self._failed(_for_client(completion.error)) if completion.error else _json(whole(chat, completion))
        items = self.engine.stream(chat.request)
        first = await anext(items)  # a failure before any text has its own HTTP status
        if isinstance(first, Completion) and first.error is not None:
            await items.aclose()
            return self._failed(_for_client(first.error))
        return StreamingResponse(self._events(chat, first, items), media_type="text/event-stream")

    async def _events(
        self, chat: ChatRequest, item: Delta | Completion, items: AsyncGenerator[Delta | Completion, None]
    ) -> AsyncIterator[bytes]:
        chunks = Chunks(chat)
        try:
            async with contextlib.aclosing(items):  # when a client disconnects, the engine stops generating
                while isinstance(item, Delta):
                    yield chunks.piece(item)
                    item = await anext(items)
            if item.error is not None:
                item.error = _for_client(item.error)
                self._failed(item.error)
            for chunk in chunks.end(item):
                yield chunk
        except Exception:
            yield event(error_body(_bug()))

    def _failed(self, failure: Failure) -> Response:
        if failure.type == "engine_crash":
            self.broken = failure.message
        return _json(error_body(failure), status_of(failure))


def _parsed(content: bytes) -> Any:
    """The JSON of a body. Raises `EngineError`."""
    try:
        return loads(content)
    except ValueError as error:
        raise invalid(f"the body: {error}") from None


def _bug() -> Failure:
    """The failure of a request that met a bug. Its exception, which may hold anything, is only in the log."""
    logger.exception("a bug")
    return Failure("server", "an internal error; the log of the server has its traceback")


def _for_client(failure: Failure) -> Failure:
    """An engine's failure as a client may see it."""
    if failure.type not in _HIDDEN:
        return failure
    logger.error("%s: %s", failure.type, failure.message)
    return Failure("server", _HIDDEN[failure.type], 502, failure.retryable)


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(dumps(value), status, media_type="application/json")
