"""`engine=bedrock`: Amazon Bedrock's Converse API through boto3. Its blocking calls run in a pool of threads."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engines.errors import ConfigError, EngineError, ErrorType
from engines.remote import bedrock_converse
from engines.remote.auth import Auth
from engines.remote.concurrency import Endpoint, EndpointPool
from engines.remote.engine import RemoteEngine
from engines.remote.errors import failure
from engines.remote.wire import bad_response, check_choices
from engines.rendering import render_http
from engines.types import Completion, Request


class BedrockEngine(RemoteEngine):
    """Bedrock. Credentials come from AWS's own chain, the region from AWS_REGION or AWS's configuration."""

    kind = "bedrock"

    def _connect(self) -> None:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        config = self.config
        self.wire = bedrock_converse
        self.auth = Auth({})
        urls = config.base_url if isinstance(config.base_url, list) else [config.base_url]
        if len(urls) > 1:
            raise ConfigError("engine=bedrock takes one engine.base_url")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        settings = Config(
            retries={"total_max_attempts": 1},  # `RemoteEngine` retries
            max_pool_connections=self.max_concurrency,
            connect_timeout=min(config.connect_timeout_s, config.timeout_s),
            read_timeout=config.read_timeout_s or config.timeout_s,
        )
        try:
            session = boto3.Session(region_name=region)
            if session.region_name is None:
                raise ConfigError("engine=bedrock needs a region: export AWS_REGION=us-east-1 (or another one)")
            self.client: Any = session.client("bedrock-runtime", endpoint_url=urls[0], config=settings)
        except BotoCoreError as error:
            raise ConfigError(f"engine=bedrock: {' '.join(str(error).split())}") from None
        self.endpoints = EndpointPool([self.client.meta.endpoint_url])
        self.headers: dict[str, str] = {}
        self.threads = ThreadPoolExecutor(self.max_concurrency, thread_name_prefix="bedrock")

    def render_request(self, request: Request) -> str:
        body = self.body(self.prepared(request))  # boto3 signs it and moves the model into the URL
        url = f"{self.endpoints.urls[0]}/model/{body.pop('modelId')}/converse"
        return render_http(url, {"authorization": "AWS4-HMAC-SHA256 ***"}, body)

    def encode(self, body: dict[str, Any]) -> tuple[Any, int]:
        return body, len(str(body["messages"])) + len(str(body.get("system", "")))

    async def _ask(self, endpoint: Endpoint, request: Request, headers: dict[str, str], content: Any) -> Completion:
        loop = asyncio.get_running_loop()
        payload = await loop.run_in_executor(self.threads, self._converse, content)
        provider, _ = self.for_model(request.model)
        completion = check_choices(bedrock_converse.completion(payload, provider), request.generation.n)
        completion.model = content["modelId"]
        return completion

    def _converse(self, content: dict[str, Any]) -> dict[str, Any]:
        """One call of the API. Raises `EngineError`."""
        from botocore import exceptions, parsers

        try:
            answer: dict[str, Any] = self.client.converse(**content)
            return answer
        except exceptions.ClientError as error:
            raise _failure(error.response) from None
        except exceptions.ParamValidationError as error:
            raise EngineError("bad_request", " ".join(str(error).split())[:500]) from None
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.TokenRetrievalError) as error:
            raise EngineError("auth", f"AWS: {error}") from None
        except (exceptions.ReadTimeoutError, exceptions.ConnectTimeoutError) as error:
            raise EngineError("timeout", f"no answer in time: {error}", retryable=True) from None
        except (parsers.ResponseParserError, UnicodeDecodeError) as error:
            raise bad_response("the answer cannot be read", error) from None
        except (exceptions.BotoCoreError, OSError) as error:
            raise EngineError("connection", " ".join(str(error).split())[:300], retryable=True) from None

    def close(self) -> None:
        if hasattr(self, "client"):
            self.threads.shutdown(wait=False, cancel_futures=True)
            self.client.close()


# Bedrock's error codes whose HTTP status says less than the code.
_TYPES: dict[str, ErrorType] = {
    "ThrottlingException": "rate_limit",
    "TooManyRequestsException": "rate_limit",
    "ServiceQuotaExceededException": "rate_limit",
    "ModelTimeoutException": "timeout",
    "ModelErrorException": "server",
    "ModelNotReadyException": "server",
    "AccessDeniedException": "auth",
    "UnrecognizedClientException": "auth",
    "ExpiredTokenException": "auth",
}


def _failure(response: dict[str, Any]) -> EngineError:
    import orjson

    said, about = response.get("Error") or {}, response.get("ResponseMetadata") or {}
    status = int(about.get("HTTPStatusCode") or 500)
    body = orjson.dumps({"error": {"code": str(said.get("Code")), "message": str(said.get("Message") or said.get("Code"))}})
    error = failure(status, body, about.get("HTTPHeaders") or {})
    if kind := _TYPES.get(str(said.get("Code"))):
        error.type = kind
        error.retryable = kind in ("rate_limit", "timeout", "server")
    return error
