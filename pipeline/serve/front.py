"""The front of `eagleray serve`: wraps the HTTP proxy of Ray Serve, which by itself keeps a body of any size in memory.

The proxy imports `middlewares` (an environment variable of Ray Serve names it) when it starts. A request goes to a replica
when its whole body is here, so a slow client holds no place in a replica. Every error has OpenAI's form.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping

from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engines.errors import EngineError, Failure
from pipeline.config import ServeConfig
from pipeline.serve.errors import error_body, status_of
from pipeline.serve.request_body import read_body
from pipeline.storage.exact_json import dumps

_LIMITS = "EAGLERAY_SERVE_LIMITS"
# Headers of Ray Serve with which a client would change its time limit, or go away and leave its request running.
_NOT_FOR_CLIENTS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")


def front_environment(serve: ServeConfig) -> dict[str, str]:
    """The environment variables that put this front before Ray Serve's proxies."""
    limits = {"max_body_bytes": serve.max_body_bytes, "body_timeout_s": serve.body_timeout_s}
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.middlewares",
        _LIMITS: json.dumps(limits),
    }


def middlewares() -> list[Middleware]:
    """Called by a proxy of Ray Serve when it starts."""
    limits = dataclasses.replace(ServeConfig(), **json.loads(os.environ[_LIMITS]))
    return [Middleware(Front, limits=limits)]


class Front:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, limits: ServeConfig) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name.lower() not in _NOT_FOR_CLIENTS]
        answer = Answer(send)
        try:
            body = await read_body(HttpRequest(scope, receive), self.limits)
        except EngineError as error:
            await answer.fail(Failure.of(error), {"connection": "close"})  # the rest of the body is not read
            return
        except ClientDisconnect:
            return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_whole() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, receive_whole, answer.send)
        await answer.end()


class Answer:
    """Passes an answer on. Errors that are not JSON, which are those of Ray Serve itself, get OpenAI's form."""

    def __init__(self, send: Send) -> None:
        self.to_client = send
        self.begun = False
        self.status: int | None = None  # of an error that is not JSON
        self.text = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            if message["status"] >= 400 and kinds[:1] != [b"application/json"]:
                self.status = message["status"]
        if self.status is None:
            await self.to_client(message)
        elif message["type"] == "http.response.body":
            self.text = (self.text + message.get("body", b""))[:1000]
            if not message.get("more_body", False):
                await self.fail(Failure("server", self.text.decode(errors="replace"), self.status))

    async def end(self) -> None:
        """Called after the application's end: it may have sent nothing."""
        if not self.begun:
            await self.fail(
                Failure("engine_crash", "the replica that had this request died: send it again"), {"retry-after": "1"}
            )

    async def fail(self, failure: Failure, headers: Mapping[str, str] | None = None) -> None:
        content = dumps(error_body(failure))
        found = {"content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
        encoded = [(name.encode(), value.encode()) for name, value in found.items()]
        self.begun = True
        await self.to_client({"type": "http.response.start", "status": status_of(failure), "headers": encoded})
        await self.to_client({"type": "http.response.body", "body": content})
