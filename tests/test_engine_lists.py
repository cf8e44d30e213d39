"""`eagleray engines` and `eagleray models`: which engines can be used here, and which models a provider lists."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from engines.config import config_from_keys
from engines.registry import REGISTRY
from jobs import engines as engines_job
from jobs import models
from tests.support.loopback import LoopbackServer

KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENROUTER_API_KEY", "TOGETHER_API_KEY", "AWS_REGION", "AWS_DEFAULT_REGION",
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_BEARER_TOKEN_BEDROCK")  # fmt: skip
SECRET = "sk-of-the-lists-0123456789"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


@dataclass
class ModelServer(LoopbackServer):
    """`answers[path and query]` is the status and the JSON of the answer; every other path is a 404."""

    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/{path:.*}", self.handle)
        return app

    async def handle(self, request: web.Request) -> web.Response:
        self.asked.append((request.path_qs, dict(request.headers)))
        status, body = self.answers.get(request.path_qs, (404, {"error": {"message": "no such path"}}))
        return web.json_response(body, status=status)


@pytest.fixture(scope="module")
def running() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def server(running: ModelServer) -> ModelServer:
    running.answers.clear()
    running.asked.clear()
    return running


def listed(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert models.main([*argv, "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# -- engines ------------------------------------------------------------------------------------------------------------


def test_each_engine_has_a_line_with_its_place_its_needs_and_its_features(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert engines_job.main([]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines()[1:]}
    assert set(lines) == set(REGISTRY) and SECRET not in printed
    for engine, usable, words in (
        ("openai", "yes", ("at the provider", "  OPENAI_API_KEY  ", "images, json_schema, batches")),
        ("anthropic", "no", ("ANTHROPIC_API_KEY (not set)",)),
        ("echo", "yes", ("in the workers", "adapter per row")),
        ("llamacpp", "yes", ("in the workers", "eagleray[llamacpp]  ", "grammar")),
        ("sglang_offline", "yes" if find_spec("sglang") else "no", ("in the workers", "eagleray[sglang]")),
        ("remote_vllm", "yes", ("on your server", "engine.base_url")),
        ("bedrock", "maybe", ("AWS's credentials (not checked)",)),
        ("lambda", "no", ("engine.base_url",)),
    ):
        assert lines[engine].split()[1] == usable, engine
        assert all(word in lines[engine] for word in words), engine


def test_a_program_gets_the_same_as_values(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    assert engines_job.main(["--json"]) == 0
    printed = capsys.readouterr().out
    found = {engine["engine"]: engine for engine in json.loads(printed)}
    assert found["bedrock"]["usable"] is True and found["openai"]["usable"] is False and SECRET not in printed
    (need,) = found["openai"]["needs"]
    assert (need["kind"], need["name"], need["here"]) == ("variable", "OPENAI_API_KEY", False)
    assert "ended on 2025-09-25" in found["lambda"]["ended"]


def test_an_engine_of_the_users_own_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "engine").mkdir()
    text = "kind: acme\nbase_url: https://acme.example/v1\napi_key_env: ACME_KEY\nprovider: {wire: chat, images: false}\n"
    (tmp_path / "engine" / "acme.yaml").write_text(text)
    assert engines_job.main(["--config-dir", str(tmp_path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("acme"))
    assert "at the provider" in line and "ACME_KEY (not set)" in line and "images" not in line
    assert engines_job.main(["--nothing"]) == 2


# -- models of a provider -----------------------------------------------------------------------------------------------


def test_the_providers_list_has_its_last_days_and_our_prices(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.answers["/v1/models"] = 200, {"object": "list", "data": [
        {"id": "gpt-9-new", "object": "model", "shutdown_date": None},
        {"id": "gpt-5.4-mini", "object": "model", "shutdown_date": "2031-05-06"},
        {"id": "gpt-5", "object": "model"},
        {"id": "evil\x1b[31m", "object": "model"}, {"no": "id"}, 7,
    ]}  # fmt: skip
    base = f"engine.base_url={server.url}"
    found = listed(capsys, "openai", base)
    assert (found["source"], found["url"], found["problem"]) == ("provider", f"{server.url}/v1/models", None)
    by_id = {model["id"]: model for model in found["models"]}
    assert list(by_id) == ["evil\x1b[31m", "gpt-5", "gpt-5.4-mini", "gpt-9-new"]
    assert by_id["gpt-9-new"] == {"id": "gpt-9-new", "context": None, "ends": None, "price": None}
    assert by_id["gpt-5.4-mini"]["ends"] == "2031-05-06"  # the provider's day comes before ours
    price = by_id["gpt-5.4-mini"]["price"]
    assert (price["input"], price["cached_input"], price["output"]) == (0.75, 0.075, 4.5) and price["as_of"]
    assert by_id["gpt-5"]["ends"] == "2026-12-11"  # by our list
    assert server.asked[0][1]["Authorization"] == f"Bearer {SECRET}"
    assert models.main(["openai", base]) == 0
    printed = capsys.readouterr().out
    assert "4 models" in printed and "\x1b" not in printed and SECRET not in printed
    assert "US$ per million tokens" in printed and "2031-05-06" in printed


def test_anthropics_list_has_pages(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", SECRET)
    one, two = ({"type": "model", "id": name, "max_input_tokens": 200000} for name in ("claude-b", "claude-a"))
    server.answers["/v1/models?limit=1000"] = 200, {"data": [one], "has_more": True, "last_id": "claude-b"}
    server.answers["/v1/models?limit=1000&after_id=claude-b"] = 200, {"data": [two], "has_more": False}
    found = listed(capsys, "anthropic", f"engine.base_url={server.url}/v1/messages")
    assert [(model["id"], model["context"]) for model in found["models"]] == [("claude-a", 200000), ("claude-b", 200000)]
    assert server.asked[0][1]["x-api-key"] == SECRET and server.asked[0][1]["anthropic-version"]


def test_lists_of_other_shapes_are_read(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", SECRET)
    monkeypatch.setenv("TOGETHER_API_KEY", SECRET)
    server.answers["/api/v1/models"] = (
        200,
        {
            "data": [{"id": "a/x", "context_length": 8192, "expiration_date": "2027-01-31"}],
            "links": {"next": "/api/v1/models?offset=1"},
        },
    )
    server.answers["/api/v1/models?offset=1"] = (
        200,
        {
            "data": [{"id": "b/y", "deprecation": "2027-07-31T12:00:00Z"}],
            "links": {"next": "https://elsewhere.example/models"},  # another server is not asked with the key
        },
    )
    found = listed(capsys, "openrouter", f"engine.base_url={server.url}/api/v1")["models"]
    assert [(m["id"], m["context"], m["ends"]) for m in found] == [("a/x", 8192, "2027-01-31"), ("b/y", None, "2027-07-31")]
    server.answers["/v1/models"] = 200, [{"id": "org/model", "context_length": 4096, "type": "chat"}]
    assert [m["id"] for m in listed(capsys, "together", f"engine.base_url={server.url}/v1")["models"]] == ["org/model"]
    server.answers["/v1/models"] = 200, {"data": [{"id": "models/gemini-3", "max_model_len": True}]}
    monkeypatch.setenv("GEMINI_API_KEY", SECRET)
    (model,) = listed(capsys, "gemini", f"engine.base_url={server.url}/v1")["models"]
    assert (model["id"], model["context"]) == ("gemini-3", None)


def test_bedrock_lists_models_and_inference_profiles(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": SECRET,
              "AWS_ENDPOINT_URL_BEDROCK": server.url, "NO_PROXY": "127.0.0.1"}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    server.answers["/foundation-models?byOutputModality=TEXT"] = 200, {"modelSummaries": [
        {"modelId": "amazon.nova-lite-v1:0", "inferenceTypesSupported": ["ON_DEMAND"],
         "modelLifecycle": {"status": "LEGACY", "endOfLifeTime": "2027-02-03T00:00:00Z"}},
        {"modelId": "anthropic.claude-x", "inferenceTypesSupported": ["INFERENCE_PROFILE"]},
    ]}  # fmt: skip
    server.answers["/inference-profiles"] = 200, {
        "inferenceProfileSummaries": [{"inferenceProfileId": "us.anthropic.claude-x"}], "nextToken": "more",
    }  # fmt: skip
    server.answers["/inference-profiles?nextToken=more"] = (
        200,
        {
            "inferenceProfileSummaries": [{"inferenceProfileId": "eu.anthropic.claude-x"}],
        },
    )
    found = listed(capsys, "bedrock")["models"]
    assert [(model["id"], model["ends"]) for model in found] == [
        ("amazon.nova-lite-v1:0", "2027-02-03"), ("eu.anthropic.claude-x", None), ("us.anthropic.claude-x", None),
    ]  # fmt: skip


# -- without the provider's list ----------------------------------------------------------------------------------------


def test_without_a_key_the_dated_list_is_shown_and_the_variable_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert models.main(["openai"]) == 3
    printed = capsys.readouterr()
    assert "export OPENAI_API_KEY=…" in printed.err and printed.err.count("\n") == 1
    assert "in our price list" in printed.out and "gpt-5.4-mini" in printed.out
    found = listed(capsys, "openai", status=3)
    assert found["source"] == "price list" and "OPENAI_API_KEY" in found["problem"]
    assert all(model["price"]["as_of"] for model in found["models"])
    (tmp_path / "price").mkdir()
    own = "as_of: 2026-11-20\nmodels:\n  deepseek-own: {input: 1, output: 2, ends: 2027-03-04}\n"
    (tmp_path / "price" / "deepseek.yaml").write_text(own)
    (model,) = listed(capsys, "deepseek", "--config-dir", str(tmp_path), status=3)["models"]
    assert (model["id"], model["ends"], model["price"]["as_of"]) == ("deepseek-own", "2027-03-04", "2026-11-20")


def test_a_server_that_gives_no_list_is_named(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.answers["/v1/models"] = 401, {"error": {"message": f"Incorrect API key: {SECRET}", "code": "invalid_api_key"}}
    found = listed(capsys, "openai", f"engine.base_url={server.url}", status=3)
    assert found["source"] == "price list" and "Incorrect API key" in found["problem"] and SECRET not in found["problem"]
    for answer in ({"data": "none"}, "none"):
        server.answers["/v1/models"] = 200, answer
        assert models.main(["openai_compatible", f"engine.base_url={server.url}"]) == 2
        assert f"{server.url}/v1/models: the answer is not a list of models" in capsys.readouterr().err
    server.answers["/v1/models"] = 404, {}
    assert models.main(["openai_compatible", f"engine.base_url={server.url}"]) == 2
    assert f"{server.url}/v1/models" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "missing: ENGINE"),
        (["openai", "anthropic"], "one ENGINE at a time, not 2"),
        (["opnai"], "did you mean 'openai'?"),
        (["vllm"], "engine=vllm has no list of models: engine.model is a file, a directory or an id of the hub"),
        (["vertex"], "the API of engine=vertex has no list of models"),
        (["openai_compatible"], "needs engine.base_url"),
        (["deepseek"], "export DEEPSEEK_API_KEY=…"),
        (["lambda"], "ended on 2025-09-25"),
        (["openai", "engine.modle=x"], "did you mean 'engine.model'?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert models.main(argv) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_only_remote_engines_with_a_list_say_so() -> None:
    without = {kind for kind in REGISTRY if config_from_keys(kind, {}).provider.get("lists_models") is False}
    assert without == {"vertex"}
