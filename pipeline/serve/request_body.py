"""Reads the body of an HTTP request, with a limit of its bytes and of the time that it takes."""

from __future__ import annotations

import asyncio

from starlette.requests import Request as HttpRequest

from engines.errors import EngineError
from pipeline.config import ServeConfig


async def read_body(http: HttpRequest, limits: ServeConfig) -> bytes:
    """The whole body. Raises `EngineError` if it is too large or too slow, and Starlette's `ClientDisconnect`."""
    declared = http.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limits.max_body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in http.stream():
                body += chunk
                if len(body) > limits.max_body_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        text = f"the body did not arrive within {limits.body_timeout_s:g} s (serve.body_timeout_s)"
        raise EngineError("timeout", text, status=408) from None
    return bytes(body)


def _too_large(limits: ServeConfig) -> EngineError:
    text = f"the body has more than {limits.max_body_bytes:,} bytes (serve.max_body_bytes)"
    return EngineError("bad_request", text, status=413)
