"""`engine=bedrock`: Amazon Bedrock's Converse API through boto3. Its blocking calls run in a pool of threads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engines.config import EngineConfig
from engines.errors import ConfigError, EngineError, ErrorCode
from engines.remote import bedrock_converse
from engines.remote.auth import Auth
from engines.remote.concurrency import Endpoint, EndpointPool
from engines.remote.engine import RemoteEngine
from engines.remote.errors import failure
from engines.remote.wire_format import bad_response
from engines.rendering import render_http
from engines.text import one_line
from engines.types import Completion, Request


class BedrockEngine(RemoteEngine):
    """Bedrock. Credentials come from AWS's own chain, the region from AWS_REGION or AWS's configuration.

    boto3 also takes an API key of Bedrock from AWS_BEARER_TOKEN_BEDROCK.
    """

    kind = "bedrock"

    def _connect(self) -> None:
        config = self.config
        self.wire_format = bedrock_converse
        self.auth = Auth({}, os.environ.get("AWS_BEARER_TOKEN_BEDROCK", ""))  # boto3 sends it, if there is one
        urls = config.base_url if isinstance(config.base_url, list) else [config.base_url]
        if len(urls) > 1:
            raise ConfigError("engine=bedrock takes one engine.base_url", key="engine.base_url")
        self.client: Any = new_client(config, "bedrock-runtime", urls[0], self.max_concurrency)
        self.endpoints = EndpointPool([self.client.meta.endpoint_url])
        self.headers: dict[str, str] = {}
        self.threads = ThreadPoolExecutor(self.max_concurrency, thread_name_prefix="bedrock")

    def render_request(self, request: Request) -> str:
        body = self.body(self.prepared(request))  # boto3 signs it and moves the model into the URL
        url = f"{self.endpoints.urls[0]}/model/{body.pop('modelId')}/converse"
        return render_http(url, {"authorization": f"{'Bearer' if self.auth.secret else 'AWS4-HMAC-SHA256'} ***"}, body)

    def encode(self, body: dict[str, Any]) -> tuple[Any, int]:
        return body, len(str(body["messages"])) + len(str(body.get("system", "")))

    async def _ask(self, endpoint: Endpoint, request: Request, headers: dict[str, str], content: Any) -> Completion:
        loop = asyncio.get_running_loop()
        try:
            payload = await loop.run_in_executor(self.threads, self._converse, content)
        except EngineError as error:
            raise self.cleaned(error) from None
        completion = self.read(payload, request.generation.n, request.model)
        completion.model = content["modelId"]
        return completion

    def _converse(self, content: dict[str, Any]) -> dict[str, Any]:
        """One call of the API. Raises `EngineError`."""
        return call(lambda: self.client.converse(**content))

    def close(self) -> None:
        if hasattr(self, "client"):
            self.threads.shutdown(wait=False, cancel_futures=True)
            self.client.close()


def new_client(config: EngineConfig, service: str, url: str | None = None, connections: int = 1) -> Any:
    """A client of boto3 without retries of its own. Raises `ConfigError` if there is no region."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    settings = Config(
        retries={"total_max_attempts": 1},  # `RemoteEngine` retries
        max_pool_connections=connections,
        connect_timeout=min(config.connect_timeout_s, config.timeout_s),
        read_timeout=config.read_timeout_s or config.timeout_s,
    )
    try:
        session = boto3.Session(region_name=region)
        if session.region_name is None:
            raise ConfigError(
                "engine=bedrock needs a region: export AWS_REGION=us-east-1 (or another one)", key="engine=bedrock"
            )
        return session.client(service, endpoint_url=url, config=settings)
    except BotoCoreError as error:
        raise ConfigError(f"engine=bedrock: {' '.join(str(error).split())}", key="engine=bedrock") from None


def call(method: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of one call of boto3. Raises `EngineError`."""
    from botocore import exceptions, parsers

    try:
        return method()
    except exceptions.ClientError as error:
        raise _failure(error.response) from None
    except exceptions.ParamValidationError as error:
        raise EngineError("bad_request", one_line(error)) from None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.TokenRetrievalError) as error:
        raise EngineError("auth", f"AWS: {error}", code=ErrorCode.KEY_REFUSED, scope="key") from None
    except exceptions.ReadTimeoutError as error:
        text = f"no answer within engine.timeout_s or engine.read_timeout_s: {error}"
        raise EngineError("timeout", text, retryable=True) from None
    except (parsers.ResponseParserError, UnicodeDecodeError) as error:
        raise bad_response("the answer cannot be read", error) from None
    except (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError, OSError) as error:
        raise EngineError("connection", one_line(error), retryable=True) from None
    except exceptions.CredentialRetrievalError as error:
        raise EngineError("auth", f"AWS: {one_line(error)}", retryable=True) from None
    except exceptions.BotoCoreError as error:  # boto3 refuses to send it, for example with a key over plain http
        raise EngineError("bad_request", one_line(error)) from None


def _failure(response: dict[str, Any]) -> EngineError:
    import orjson

    said, about = response.get("Error") or {}, response.get("ResponseMetadata") or {}
    status = int(about.get("HTTPStatusCode") or 500)
    body = orjson.dumps({"error": {"code": str(said.get("Code")), "message": str(said.get("Message") or said.get("Code"))}})
    return failure(status, body, about.get("HTTPHeaders") or {})
