"""Traces, taken by a real receiver of OTLP over HTTP: what is in them, what never is, and what they cost when off."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from engines.errors import ConfigError
from tests.support.infer import Infer, ask
from tests.support.together import Together

SECRET = "Bearer not-for-anybody"


class Collector(ThreadingHTTPServer):
    """Keeps each span with its resource's attributes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list[tuple[dict[str, Any], Span]] = []
        self.delay_s = 0.0
        self.raw, self.paths, self.keys = b"", set[str](), set[str | None]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.server.delay_s)
        self.server.raw += body
        self.server.paths.add(self.path)
        self.server.keys.add(self.headers["Authorization"])
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in group.scope_spans:
                self.server.spans += [(values(group.resource.attributes), span) for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def values(attributes: Any) -> dict[str, Any]:
    found = {}
    for item in attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind)
        found[item.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        yield server
        server.shutdown()


def test_every_request_is_a_span_below_the_runs_and_bears_no_text(
    infer: Infer, tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.executors.live.live_run.Dispatcher", Together)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization={SECRET}")
    data = tmp_path / "in.jsonl"
    rows = [ask(f"classified {i}", id=f"row-{i}") for i in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("hardware.replicas=2", "engine.model=parrot", "engine.kwargs.latency_s=0.05", "engine.max_concurrency=4")
    outcome = infer(data, f"run.traces={collector.url}", *more, "engine.kwargs.failure_rate=0.2")
    failed = outcome.manifest["rows"]["failed"]
    assert 0 < failed < 60

    spans = collector.spans
    (top,) = [(where, span) for where, span in spans if span.name == "eagleray run"]
    requests = [(where, span) for where, span in spans if span.name == "chat parrot"]
    assert len(spans) == 61
    assert {where["service.name"] for where, _ in spans} == {"eagleray"}
    assert {where["service.instance.id"] for where, _ in requests} == {"w1", "w2"}
    assert {(span.trace_id, span.parent_span_id) for _, span in requests} == {(top[1].trace_id, top[1].span_id)}
    assert top[1].start_time_unix_nano < min(span.start_time_unix_nano for _, span in requests)
    assert top[1].end_time_unix_nano > max(span.end_time_unix_nano for _, span in requests)
    assert values(top[1].attributes)["eagleray.rows.failed"] == failed

    told = {values(span.attributes)["eagleray.id"]: (values(span.attributes), span) for _, span in requests}
    assert set(told) == {f"row-{i}" for i in range(60)}
    bad = [one for one in told.values() if "error.type" in one[0]]
    assert len(bad) == failed
    assert {(one["error.type"], span.status.code) for one, span in bad} == {("server", Status.STATUS_CODE_ERROR)}
    fine, span = next(one for one in told.values() if "error.type" not in one[0])
    assert len(fine.pop("eagleray.key")) == 64
    fine.pop("eagleray.id")
    assert fine == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "echo",
        "gen_ai.request.model": "parrot",
        "gen_ai.response.model": "parrot",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 2,
        "eagleray.engine": "echo",
        "eagleray.attempts": 1,
    }
    assert span.kind == Span.SPAN_KIND_CLIENT
    assert span.end_time_unix_nano - span.start_time_unix_nano > 20_000_000
    assert collector.paths == {"/v1/traces"} and collector.keys == {SECRET}
    assert b"classified" not in collector.raw and b"told to fail" not in collector.raw
    assert SECRET not in json.dumps(outcome.manifest) + infer.printed


def test_the_spans_of_a_worker_are_sent_before_its_process_ends(infer: Infer, tmp_path: Path, collector: Collector) -> None:
    """The collector is slow, and a worker sends at most 512 spans at once."""
    collector.delay_s = 1.0
    data = tmp_path / "in.jsonl"
    data.write_text("".join(json.dumps(ask(f"{i}")) + "\n" for i in range(600)))
    assert infer(data, f"run.traces={collector.url}").exit_status == 0
    assert len(collector.spans) == 601


@pytest.mark.slow
def test_a_collector_that_is_away_costs_a_line_and_no_row(infer: Infer, tmp_path: Path, collector: Collector) -> None:
    collector.shutdown()
    collector.server_close()
    data = tmp_path / "in.jsonl"
    data.write_text(json.dumps(ask("hello")) + "\n")
    outcome = infer(data, f"run.traces={collector.url}")
    assert outcome.exit_status == 0
    assert infer.printed.count("did not accept the traces") == 1


def test_an_address_that_is_none_is_refused(infer: Infer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run.traces must be an http:// or https:// address, not 'on'"):
        infer(tmp_path, "run.traces=on")


def test_opentelemetry_is_imported_only_when_it_is_on() -> None:
    code = (
        "import sys, pipeline.run, pipeline.executors.live.worker; "
        "sys.exit(any(m.startswith('opentelemetry') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_packages_it_says_what_to_install(
    infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    data = tmp_path / "in.jsonl"
    data.write_text(json.dumps(ask("hello")) + "\n")
    with pytest.raises(ConfigError, match=r"run.traces needs OpenTelemetry: run pip install 'eagleray\[traces\]'"):
        infer(data, "run.traces=http://127.0.0.1:1")
    assert not (infer.out / "manifest.json").exists()


def test_a_sampler_of_the_environment_is_heeded(
    infer: Infer, tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    data = tmp_path / "in.jsonl"
    data.write_text(json.dumps(ask("hello")) + "\n")
    assert infer(data, f"run.traces={collector.url}").exit_status == 0
    assert not collector.spans and "did not accept" not in infer.printed
