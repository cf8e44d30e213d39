"""Errors of real providers: their type, whether the same request is sent again, and what else the same error would hit."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import engines.remote.sender
from engines import load_engine
from engines.errors import ErrorCode, Failure
from engines.remote.errors import failure
from tests.support.infer import ask

CASES: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "data" / "provider_errors.yaml").read_text())
ANSWER = {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}], "usage": {}}


class Replay(BaseHTTPRequestHandler):
    """Answers the request with the number that its text has by the error of this number; the second time it answers."""

    protocol_version = "HTTP/1.1"
    asked: Counter[int]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        number = int(body["messages"][-1]["content"])
        self.asked[number] += 1
        case = CASES[number] if self.asked[number] == 1 else {"status": 200, "body": json.dumps(ANSWER)}
        content = case["body"].encode()
        self.send_response(case["status"])
        headers = {"content-type": "application/json", **case.get("headers", {}), "content-length": str(len(content))}
        headers.pop("retry-after", None)  # `test_the_wait…` has it: nobody waits here
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def met() -> Iterator[list[tuple[int, Failure | None]]]:
    """How often each request was sent to a real server, and the failure in its completion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines.remote.sender, "BACKOFF_FIRST_S", 0.001)
        patch.setattr(engines.remote.sender, "MOST_PAUSE_S", 0.0)
        handler = type("Handler", (Replay,), {"asked": Counter()})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}"
            # One at a time: each error meets a server that has answered before.
            with load_engine("openai_compatible", base_url=url, model="m", max_concurrency=1) as engine:
                engine.remote.retries.maximum = engine.remote.retries.tokens = 1e9  # type: ignore[union-attr]
                engine.remote._asked_wait = lambda _: 0.0  # type: ignore[union-attr, method-assign]
                done = engine.infer([ask(str(number)) for number in range(len(CASES))])
            server.shutdown()
        yield [(handler.asked[number], each.error) for number, each in enumerate(done)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{CASES[number]['from']}-{number}")
def test_an_error_means_what_a_person_would_say(number: int, met: list[tuple[int, Failure | None]]) -> None:
    case, (asked, error) = CASES[number], met[number]
    kind, scope, again = case["means"].split()
    if again == "again":
        assert (asked, error) == (2, None)
    else:
        assert error is not None, "it was sent again"
        assert (asked, error.type, error.scope, error.retryable) == (1, kind, scope, False), error.message
        assert (error.code == ErrorCode.ACCOUNT_EMPTY) == case.get("empty", False)
    seen = failure(case["status"], case["body"].encode(), case.get("headers", {}))
    assert (seen.type, seen.scope, seen.retryable) == (kind, scope, again == "again"), str(seen)
    assert seen.retry_after == case.get("wait")
    assert len(str(seen).splitlines()) == 1 and "<" not in str(seen).replace("<400>", "").replace("<org-abc>", "").replace(
        "<= ", ""
    )


def test_the_table_is_broad() -> None:
    assert len(CASES) >= 60 and len({case["from"] for case in CASES}) >= 20
