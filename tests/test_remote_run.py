"""The main job against a provider: faults, outages, limits and keys, on real Ray and a real server."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from engines.errors import ConfigError
from pipeline.errors import Interrupted, Stopped
from pipeline.executors.live.rate_limiter import rate_limit_actor
from tests.support.infer import Infer, ask
from tests.support.processes import until
from tests.support.provider_server import ProviderServer, by_hash

Write = Callable[..., Path]
KEY = "sk-0123456789-a-key-that-nobody-may-see"


def remote(server: ProviderServer, *more: str) -> list[str]:
    return ["engine.model=m", f"engine.base_url={server.url}", *more]


@pytest.mark.slow
def test_no_row_is_lost_or_paid_twice_where_many_requests_go_wrong(
    infer: Infer, write_jsonl: Write, server: ProviderServer
) -> None:
    server.fault = by_hash(0.05)
    rows = 3000
    data = write_jsonl([ask(f"row {i}", id=str(i)) for i in range(rows)])
    outcome = infer(data, *remote(server, "engine.timeout_s=15"), engine="openai_compatible")
    assert outcome.exit_status == 0, infer.printed
    found = infer.rows()
    assert [row["response"] for row in found] == [f"row {i}" for i in range(rows)]
    assert {row["engine"] for row in found} == {"openai_compatible"}
    # Every request beyond one a row was a fault, and each row knows how many it took.
    assert len(server.requests) == rows + sum(server.faults.values())
    assert sum(row["attempts"] for row in found) == len(server.requests)
    assert len(server.faults) > 10


@pytest.mark.slow
def test_an_outage_stops_the_run_resumably_and_drops_no_row(
    infer: Infer, write_jsonl: Write, server: ProviderServer
) -> None:
    good = {f"row {i}" for i in range(200)}
    server.fault = lambda text, _: None if text in good else "503"
    data = write_jsonl([ask(f"row {i}") for i in range(400)])
    with pytest.raises(Stopped, match="has not answered for"):
        infer(data, *remote(server, "run.max_outage_s=2"), engine="openai_compatible")
    assert not (infer.out / "manifest.json").exists()
    asked_while_down = len(server.requests)
    answered = sum(request.text in good for request in server.requests)
    server.fault = lambda text, _: None
    assert infer(data, *remote(server), engine="openai_compatible").exit_status == 0
    assert [row["response"] for row in infer.rows()] == [f"row {i}" for i in range(400)]
    # The answers of the first run were kept: only the others were asked again.
    assert len(server.requests) - asked_while_down == 400 - answered


def test_a_key_that_is_refused_stops_the_run_and_is_shown_nowhere(
    infer: Infer, write_jsonl: Write, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.key = "another"
    data = write_jsonl([ask(f"row {i}") for i in range(300)])
    with pytest.raises(Stopped, match="refuses the key") as stopped:
        infer(data, *remote(server, "engine.api_key_env=MY_KEY"), engine="openai_compatible")
    assert KEY not in infer.printed + str(stopped.value)
    assert "Incorrect API key provided: ***" in str(stopped.value)


@pytest.mark.slow
def test_the_drivers_key_reaches_the_workers_and_no_file(
    infer: Infer, write_jsonl: Write, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)  # after Ray was started: its processes do not have it
    server.key = KEY
    assert infer(write_jsonl([ask("a"), ask("b")]), *remote(server), engine="anthropic").exit_status == 0
    assert server.requests[0].headers["x-api-key"] == KEY
    assert server.requests[0].headers["anthropic-version"]
    logs = Path(ray._private.worker._global_node.get_session_dir_path())  # type: ignore[attr-defined]
    for folder in (infer.out, logs / "logs"):
        for path in folder.rglob("*"):
            assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_a_parameter_nobody_could_be_asked_with_is_a_configuration_error(
    infer: Infer, write_jsonl: Write, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    data = write_jsonl([ask("a"), ask("b", generation={"min_p": 0.1})])
    with pytest.raises(ConfigError, match=r"generation\.top_k is not supported by engine=openai"):
        infer(data, *remote(server, "generation.top_k=3"), engine="openai")
    assert not server.requests
    # For one row it is that row's error, before anything is sent.
    assert infer(data, *remote(server), engine="openai").exit_status == 3
    error = infer.rows()[1]["error"]
    assert error["type"] == "invalid_input"
    assert "generation.min_p" in error["message"]
    assert server.texts() == ["a"]
    assert infer(data, *remote(server, "generation.top_k=3", "engine.unsupported=drop"), engine="openai").exit_status == 0


@pytest.mark.slow
def test_replicas_share_one_limit_and_outlive_its_actor(infer: Infer, write_jsonl: Write, server: ProviderServer) -> None:
    data = write_jsonl([ask(f"row {i}") for i in range(60)])
    overrides = remote(server, "engine.requests_per_minute=600", "hardware.replicas=2")

    def kill_once_it_works() -> None:
        from engines.config import config_from_keys

        until(lambda: len(server.requests) >= 20)
        config = config_from_keys("openai_compatible", {"base_url": server.url})
        ray.kill(rate_limit_actor(config), no_restart=False)

    killer = threading.Thread(target=kill_once_it_works)
    killer.start()
    assert infer(data, *overrides, engine="openai_compatible").exit_status == 0
    killer.join()
    assert sorted(server.texts()) == sorted(f"row {i}" for i in range(60))
    # 10 a second, one slack of half a second before and one after the actor's death: 60 rows cannot come sooner.
    times = [seen.at for seen in server.requests]
    assert max(times) - min(times) > (60 - 2 * 6) / 10


@pytest.mark.slow
def test_an_interrupt_gives_back_what_waits_for_its_turn(infer: Infer, write_jsonl: Write, server: ProviderServer) -> None:
    data = write_jsonl([ask(f"row {i}") for i in range(50)])

    def interrupt() -> None:
        until(lambda: server.requests)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted):
        infer(data, *remote(server, "engine.requests_per_minute=6"), engine="openai_compatible")
    thread.join()
    first = len(server.requests)
    assert first < 10
    # Another key's limits: those of the first are kept as long as its actor lives.
    assert infer(data, *remote(server, "engine.api_key_env=NOT_SET"), engine="openai_compatible").exit_status == 0
    assert len(server.requests) == 50
    assert not any(row["error"] for row in infer.rows())


def test_what_one_engine_refuses_another_answers(infer: Infer, write_jsonl: Write, server: ProviderServer) -> None:
    server.fault = lambda text, attempt: "refusal" if text.endswith("7") and attempt == 1 else None
    data = write_jsonl([ask(f"row {i}") for i in range(40)])
    second = f"{{engine: openai_compatible, model: second, base_url: '{server.url}'}}"
    outcome = infer(data, *remote(server, f"engine.fallback=[{second}]"), engine="openai_compatible")
    assert outcome.exit_status == 0
    rows = infer.rows()
    assert [row["response"] for row in rows] == [f"row {i}" for i in range(40)]
    assert [row["model"] for row in rows] == ["second" if i % 10 == 7 else "m" for i in range(40)]
    assert rows[7]["attempts"] == 2


def test_bedrock_answers_a_dataset_with_an_image(
    infer: Infer, write_jsonl: Write, server: ProviderServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE"), ("AWS_SECRET_ACCESS_KEY", KEY), ("AWS_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    image = tmp_path / "dot.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(16))
    content = [{"type": "image_url", "image_url": {"url": str(image)}}, {"type": "text", "text": "what?"}]
    server.plan["a"] = ["429", "503"]
    data = write_jsonl([ask("a"), {"messages": [{"role": "user", "content": content}]}])
    assert infer(data, *remote(server, "engine.model=some.model-v1:0"), engine="bedrock").exit_status == 0
    rows = infer.rows()
    assert [row["response"] for row in rows] == ["a", "what?"]
    assert [row["attempts"] for row in rows] == [3, 1]
    sent = next(seen.body for seen in server.requests if seen.text == "what?")
    assert json.dumps(sent).count('"format": "png"') == 1


def test_what_a_provider_wants_back_is_in_the_messages(
    infer: Infer, write_jsonl: Callable[..., Path], server: ProviderServer
) -> None:
    signed = {
        "id": "1",
        "type": "function",
        "function": {"name": "f", "arguments": "{}"},
        "extra_content": {"google": {"s": "x"}},
    }
    message = {"role": "assistant", "content": None, "tool_calls": [signed], "reasoning_content": "hm"}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}], "usage": {}}
    server.plan["a"] = ["body=" + json.dumps(body)]
    custom = {"id": "2", "type": "custom", "custom": {"name": "run", "input": "1 + 2"}}
    asks = {"role": "assistant", "content": None, "tool_calls": [custom]}
    server.plan["c"] = [f"body={json.dumps({**body, 'choices': [{'message': asks, 'finish_reason': 'tool_calls'}]})}"]
    tool = {"type": "custom", "custom": {"name": "run"}}
    data = write_jsonl([ask("a"), ask("b"), ask("c", tools=[tool])])
    assert infer(data, *remote(server), engine="openai_compatible").exit_status == 0
    first, second, third = infer.rows()
    assert json.loads(third["messages"]) == [{"role": "user", "content": "c"}, asks]
    assert json.loads(third["tool_calls"]) == [custom]
    assert next(seen.body for seen in server.requests if seen.text == "c")["tools"] == [tool]
    assert json.loads(first["messages"]) == [{"role": "user", "content": "a"}, message]
    assert json.loads(second["messages"])[-1] == {"role": "assistant", "content": "b"}
    assert "message_fields" not in first
