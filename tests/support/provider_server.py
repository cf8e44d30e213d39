"""A provider on loopback that speaks the three wires, echoes the last user message, and misbehaves as told.

    with ProviderServer() as server:
        server.plan["hello"] = ["500", "reset"]     # what the first requests that ask "hello" meet, one each
        server.requests                             # everything that came: text, time, path, headers, body

`python -m tests.support.provider_server --port 0 --fault-rate 0.02` runs alone, prints its URL, and has GET /stats.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

from aiohttp import web

from tests.support.loopback import LoopbackServer

# status -> the body's error, as the three wires' providers write it
STATUSES = {"400": "bad", "401": "invalid x-api-key", "402": "pay", "404": "no such model", "413": "too large",
            "429": "slow down", "500": "oops", "501": "no", "502": "bad gateway", "503": "unavailable",
            "529": "Overloaded"}  # fmt: skip
# status -> the error's type on the wire of Anthropic's messages
MESSAGES_TYPES = {400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
                  404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
                  529: "overloaded_error"}  # fmt: skip
# What goes wrong in passing: asked again, the row is answered.
PASSING = ("429", "429-after", "500", "502", "503", "529", "hang", "reset", "reset-body", "truncated", "not-json", "null",
           "empty", "error-200", "bad-gzip")  # fmt: skip


@dataclass(slots=True)
class Seen:
    """One request that came."""

    text: str
    at: float  # time.monotonic()
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class ProviderServer(LoopbackServer):
    """`fault` is asked where `plan` has nothing for a text; `rpm` is a quota over any 60 s; `key` is the only good one."""

    plan: dict[str, list[str]] = field(default_factory=dict)
    fault: Callable[[str, int], str | None] = lambda text, attempt: None
    rpm: int | None = None
    key: str | None = None
    latency_s: float = 0.0
    port: int = 0
    keep: bool = True  # remember whole requests; a long run only counts
    requests: list[Seen] = field(default_factory=list)
    attempts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0
    connections: set[int] = field(default_factory=set)

    def application(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/stats", self.stats)
        app.router.add_route("*", "/{path:.*}", self.handle)
        return app

    def texts(self) -> list[str]:
        return [seen.text for seen in self.requests]

    async def stats(self, _: web.Request) -> web.Response:
        times = sorted(self.times)
        most = start = 0
        for end, t in enumerate(times):
            while t - times[start] >= 60:
                start += 1
            most = max(most, end - start + 1)
        found = {"requests": len(times), "texts": len(self.attempts), "faults": dict(self.faults), "peak_60s": most}
        return web.json_response(found)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw) if raw else {}
        text = last_text(body)
        self.times.append(time.monotonic())
        self.connections.add(id(request.transport))
        if self.keep:
            headers = {name.lower(): value for name, value in request.headers.items()}
            self.requests.append(Seen(text, self.times[-1], request.path, headers, body))
        self.attempts[text] += 1
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            given = request.headers.get("authorization", "").removeprefix("Bearer ") or request.headers.get("x-api-key")
            if self.key is not None and given != self.key:
                return error(request, 401, f"Incorrect API key provided: {given}")
            headers = {}
            if self.rpm is not None:
                left = self.rpm - sum(t > time.monotonic() - 60 for t in self.times[-self.rpm - 1 :])
                headers = {"x-ratelimit-limit-requests": str(self.rpm), "x-ratelimit-remaining-requests": str(max(0, left))}
                if left < 0:
                    return error(request, 429, "quota", headers | {"x-ratelimit-reset-requests": "1s"})
            planned = self.plan.get(text)
            fault = planned.pop(0) if planned else self.fault(text, self.attempts[text])
            if fault in (None, "break", "break-error", "end", "filtered") and body.get("stream"):
                return await stream(request, body, text, fault)
            if fault is None:
                return web.json_response(answer(request, body, text), headers=headers)
            self.faults[fault] += 1
            return await misbehave(fault, request, body, text)
        finally:
            self.busy -= 1


def last_text(body: dict[str, Any]) -> str:
    """The text of the last user message, on any of the wires."""
    for message in reversed(body.get("messages") or []):
        content = message.get("content")
        if isinstance(content, str):
            return content
        texts = [part["text"] for part in content or [] if isinstance(part.get("text"), str)]
        if texts:
            return "".join(texts)
    return ""


def answer(request: web.Request, body: dict[str, Any], text: str | None, finish: str = "stop") -> dict[str, Any]:
    """A whole answer on the wire that was asked."""
    usage = len(json.dumps(body.get("messages"))) // 4, len(text or "") // 4 + 1
    if request.path.endswith("/converse"):
        reason = {"stop": "end_turn", "length": "max_tokens"}.get(finish, finish)
        content = [{"text": text}] if text is not None else []
        counts = {"inputTokens": usage[0], "outputTokens": usage[1], "totalTokens": sum(usage)}
        message = {"role": "assistant", "content": content}
        return {"output": {"message": message}, "stopReason": reason, "usage": counts, "metrics": {"latencyMs": 1}}
    if request.path.endswith("/messages"):
        reason = {"stop": "end_turn", "length": "max_tokens"}.get(finish, finish)
        return {"id": "m", "type": "message", "role": "assistant", "model": body.get("model"), "stop_reason": reason,
                "content": [{"type": "text", "text": text}] if text is not None else None,
                "usage": {"input_tokens": usage[0], "output_tokens": usage[1]}}  # fmt: skip
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": body.get("model"), "choices": [choice],
            "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}}  # fmt: skip


async def stream(request: web.Request, body: dict[str, Any], text: str, fault: str | None) -> web.StreamResponse:
    """The answer as events, a word each, each in two pieces; or a part of them, and then a fault."""
    whole = answer(request, body, text, "content_filter" if fault == "filtered" else "stop")
    fault = None if fault == "filtered" else fault
    words = [word + " " for word in text.split(" ")]
    words[-1] = words[-1][:-1]
    events: list[dict[str, Any]] = []
    if request.path.endswith("/messages"):
        start = {"role": "assistant", "model": whole["model"], "usage": {**whole["usage"], "output_tokens": 1}}
        events = [{"type": "message_start", "message": start}, {"type": "ping"},
                  {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}]  # fmt: skip
        deltas = ({"type": "text_delta", "text": word} for word in words)
        events += ({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas)
        events += [{"type": "content_block_stop", "index": 0},
                   {"type": "message_delta", "delta": {"stop_reason": whole["stop_reason"]}, "usage": whole["usage"]},
                   {"type": "message_stop"}]  # fmt: skip
    else:
        found: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": word}} for word in words]
        found.append({"delta": {}, "finish_reason": whole["choices"][0]["finish_reason"]})
        events = [{"model": whole["model"], "choices": [{"index": 0, **choice}]} for choice in found]
        if body.get("stream_options", {}).get("include_usage"):
            events.append({"model": whole["model"], "choices": [], "usage": whole["usage"]})
    if fault is not None:
        events = events[: len(events) - 4]
    if fault == "break-error":
        events.append({"type": "error", "error": {"type": "overloaded_error", "message": "fell over"}})
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for event in events:
        line = f"event: {event.get('type')}\r\ndata: {json.dumps(event, ensure_ascii=False)}\r\n\r\n".encode()
        for piece in (line[: len(line) // 2], line[len(line) // 2 :]):
            await response.write(piece)
            await asyncio.sleep(0.002)
    if fault == "break":
        return abort(request)
    if fault is None and not request.path.endswith("/messages"):
        await response.write(b"data: [DONE]\n\n")
    return response


def error(request: web.Request, status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    if request.path.endswith("/converse"):
        kinds = {400: "ValidationException", 401: "UnrecognizedClientException", 429: "ThrottlingException",
                 503: "ServiceUnavailableException"}  # fmt: skip
        named = {"x-amzn-errortype": kinds.get(status, "InternalServerException")}
        return web.json_response({"message": message}, status=status, headers=named | (headers or {}))
    body: dict[str, Any] = {"error": {"message": message, "type": "t", "code": None}}
    if request.path.endswith("/messages"):
        body = {"type": "error", "error": {"type": MESSAGES_TYPES.get(status, "api_error"), "message": message}}
    return web.json_response(body, status=status, headers=headers)


async def misbehave(fault: str, request: web.Request, body: dict[str, Any], text: str) -> web.StreamResponse:
    name, _, rest = fault.partition("-")
    if fault in STATUSES:
        return error(request, int(fault), STATUSES[fault])
    if name in STATUSES:  # "429-after", "429-after=2", "503-date=2"
        how, _, seconds = rest.partition("=")
        value = formatdate(time.time() + float(seconds or 1), usegmt=True) if how == "date" else seconds or "1"
        return error(request, int(name), STATUSES[name], {"retry-after": value})
    if fault.startswith("answer="):  # these words; of a JSON list, where several are asked for, one each
        said = fault.removeprefix("answer=")
        found = answer(request, body, said)
        if body.get("n"):
            choices = [answer(request, body, each)["choices"][0] for each in json.loads(said)]
            found["choices"] = [{**choice, "index": at} for at, choice in enumerate(choices)]
        return web.json_response(found)
    if fault.startswith("say="):  # "say=400=the text of the error"
        _, status, message = fault.split("=", 2)
        return error(request, int(status), message)
    if fault.startswith("body="):  # a whole answer
        return web.Response(text=fault.removeprefix("body="), content_type="application/json")
    if fault == "redirect":
        raise web.HTTPTemporaryRedirect(location=request.headers.get("x-redirect", "http://localhost:1/elsewhere"))
    if fault == "hang":
        await asyncio.sleep(3600)
    if fault in ("reset", "reset-body", "slow"):
        whole = json.dumps(answer(request, body, text)).encode()
        if fault == "reset":
            return abort(request)
        response = web.StreamResponse(headers={"content-type": "application/json", "content-length": str(len(whole))})
        await response.prepare(request)
        for at in range(0, len(whole), 20):
            await response.write(whole[at : at + 20])
            if fault == "reset-body":
                return abort(request)
            await asyncio.sleep(0.01)
        return response
    if fault in ("null", "empty", "length", "content_filter", "refusal"):
        found = answer(request, body, None if fault in ("null", "content_filter") else text)
        if "choices" in found:
            choice = found["choices"][0]
            if fault == "refusal":
                choice["message"] |= {"content": None, "refusal": "I would rather not."}
            elif fault != "null":
                choice["finish_reason"] = fault
            found["choices"] = [] if fault == "empty" else [choice]
        else:
            found |= {"stop_reason": fault, "stopReason": fault}
            if fault == "length":
                found |= {"stop_reason": "max_tokens", "stopReason": "max_tokens"}
            if fault in ("null", "empty"):
                found |= {"content": None, "output": None}
            if fault == "refusal":
                found |= {"content": []}
        return web.json_response(found)
    whole = json.dumps(answer(request, body, "x" * (100 << 20) if fault == "huge" else text)).encode()
    kind, extra = "application/json", {}
    if fault == "gzip":
        whole, extra = gzip.compress(whole), {"content-encoding": "gzip"}
    elif fault == "bad-gzip":
        extra = {"content-encoding": "gzip"}
    elif fault == "truncated":
        whole = whole[: len(whole) // 2]
    elif fault == "not-json":
        whole, kind = b"<html><body>Welcome to the proxy</body></html>", "text/html"
    elif fault == "content-type":
        kind = "text/plain"
    elif fault == "error-200":
        whole = b'{"error": {"message": "upstream fell over", "code": 502}}'
    elif fault != "huge":
        raise AssertionError(f"no fault {fault}")
    return web.Response(body=whole, headers={"content-type": kind, **extra})


def abort(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def by_hash(rate: float, kinds: tuple[str, ...] = PASSING) -> Callable[[str, int], str | None]:
    """A share of all requests goes wrong, each in a way that follows from its text and attempt."""

    def fault(text: str, attempt: int) -> str | None:
        digest = hashlib.blake2b(f"{attempt} {text}".encode(), digest_size=16).digest()
        if int.from_bytes(digest[:8], "big") / 2**64 >= rate:
            return None
        return kinds[int.from_bytes(digest[8:], "big") % len(kinds)]

    return fault


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fault-rate", type=float, default=0.0)
    args = parser.parse_args()
    with ProviderServer(fault=by_hash(args.fault_rate), port=args.port, keep=False) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
